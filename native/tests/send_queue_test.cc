// SPDX-License-Identifier: Apache-2.0
#include "verbs/send_queue.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>
#include <stdexcept>

namespace rkv::verbs {
namespace {

Chain writes(std::uint32_t wrs, std::uint64_t nbytes) {
  return {.kind = Chain::Kind::kWrites, .transfer = 1, .slices = wrs, .wrs = wrs, .nbytes = nbytes};
}

TEST(SendQueue, SlotsReturnChainByChain) {
  SendQueue queue(10);
  EXPECT_TRUE(queue.idle());
  EXPECT_EQ(queue.next_sequence(), 0U);
  queue.push(writes(6, 600));
  queue.push(writes(4, 400));
  EXPECT_EQ(queue.free_wrs(), 0U);
  EXPECT_EQ(queue.outstanding_wrs(), 10U);
  EXPECT_EQ(queue.outstanding_bytes(), 1000U);
  EXPECT_EQ(queue.pop(0).wrs, 6U);
  EXPECT_EQ(queue.free_wrs(), 6U);
  EXPECT_EQ(queue.outstanding_bytes(), 400U);
  EXPECT_FALSE(queue.idle());
  EXPECT_EQ(queue.pop(1).nbytes, 400U);
  EXPECT_TRUE(queue.idle());
  EXPECT_EQ(queue.next_sequence(), 2U);
}

TEST(SendQueue, RefusesWhatWouldSpoilTheAccount) {
  SendQueue queue(4);
  EXPECT_THROW(queue.push(writes(5, 1)), std::logic_error);
  EXPECT_THROW(queue.push(writes(0, 0)), std::logic_error);
  EXPECT_THROW(queue.pop(0), std::logic_error);
  queue.push(writes(2, 1));
  queue.push(writes(2, 1));
  EXPECT_THROW(queue.pop(1), std::logic_error);
  EXPECT_THROW(queue.push(writes(1, 1)), std::logic_error);
  EXPECT_EQ(queue.outstanding_wrs(), 4U);
}

TEST(SendQueue, FindsOutstandingChainsOnly) {
  SendQueue queue(4);
  EXPECT_EQ(queue.find(0), nullptr);
  queue.push(writes(1, 1));
  queue.push({.kind = Chain::Kind::kSignal, .wrs = 1});
  queue.pop(0);
  EXPECT_EQ(queue.find(0), nullptr);
  ASSERT_NE(queue.find(1), nullptr);
  EXPECT_EQ(queue.find(1)->kind, Chain::Kind::kSignal);
  EXPECT_EQ(queue.find(2), nullptr);
}

TEST(SendQueue, SequencesWrap) {
  SendQueue queue(8, UINT32_MAX - 2);
  std::deque<std::uint32_t> posted;
  std::mt19937 random(1);
  bool wrapped = false;
  for (int i = 0; i < 1000; ++i) {
    if (queue.free_wrs() > 0 && random() % 2 == 0) {
      posted.push_back(queue.next_sequence());
      wrapped |= posted.size() > 1 && posted.back() < posted.front();
      queue.push(writes(1, posted.back()));
    } else if (!posted.empty()) {
      for (const std::uint32_t sequence : posted) {
        ASSERT_NE(queue.find(sequence), nullptr);
        ASSERT_EQ(queue.find(sequence)->nbytes, sequence);
      }
      ASSERT_EQ(queue.find(posted.front() - 1), nullptr);
      ASSERT_EQ(queue.find(queue.next_sequence()), nullptr);
      ASSERT_EQ(queue.pop(posted.front()).nbytes, posted.front());
      posted.pop_front();
    }
    ASSERT_EQ(queue.outstanding_wrs(), posted.size());
    ASSERT_EQ(queue.free_wrs() + queue.outstanding_wrs(), 8U);
  }
  EXPECT_TRUE(wrapped);
}

}  // namespace
}  // namespace rkv::verbs
