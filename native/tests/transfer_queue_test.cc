// SPDX-License-Identifier: Apache-2.0
#include "core/transfer_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

namespace rkv {
namespace {

const NoMarks kNoMarks;

/// Reached as far as the test says.
class CountingMarks final : public Marks {
 public:
  Mark reached_mark = 0;
  [[nodiscard]] Mark mark(std::uintptr_t /*stream*/) override { return 0; }
  [[nodiscard]] bool reached(Mark mark) const override { return mark <= reached_mark; }
};

/// Writes down what is posted and takes at most `room` slices at a time.
class RecordingBackend final : public Backend {
 public:
  std::ostringstream log;
  std::size_t room = SIZE_MAX;
  bool fuses = false;  ///< Whether a signal goes along with the last slice.

  [[nodiscard]] std::string_view name() const override { return "recording"; }
  [[nodiscard]] std::uint8_t lanes() const override { return 0; }
  void attach(EventLoop& /*loop*/) override {}
  Bytes register_memory(RegionId /*region*/, MemoryRange /*range*/, MemoryUse /*use*/,
                        std::unique_ptr<PinnedMemory> /*pinned*/) override {
    return {};
  }
  std::unique_ptr<PinnedMemory> deregister_memory(RegionId /*region*/) override { return nullptr; }
  Bytes create_endpoint(PeerId /*peer*/) override { return {}; }
  void connect(PeerId /*peer*/, PeerLink /*link*/) override {}
  void probe(PeerId /*peer*/) override {}
  Posted post_writes(PeerId /*peer*/, TransferId transfer, std::span<const WriteSlice> slices,
                     std::optional<std::uint32_t> imm) override {
    const std::size_t taken = std::min(room, slices.size());
    room -= taken;
    if (taken > 0) log << "w" << transfer << "x" << taken << " ";
    const bool signalled = imm && fuses && taken == slices.size();
    if (signalled) log << "+s" << *imm << " ";
    return {taken, signalled};
  }
  bool post_signal(PeerId /*peer*/, std::uint32_t imm) override {
    log << "s" << imm << " ";
    return true;
  }
  void close_peer(PeerId /*peer*/) override {}
  bool progress(std::vector<Completion>& /*completions*/) override { return false; }
  void add_stats(Stats& /*stats*/) const override {}
};

Slices slices(std::size_t n, RegionId region = 0) {
  return std::make_shared<std::vector<WriteSlice>>(n, WriteSlice{0, 0, 4096, region, 0});
}

TEST(TransferQueue, KeepsAtMostQueueDepthInFlight) {
  RecordingBackend backend;
  TransferQueue queue(1, 4, kNoMarks);
  queue.add_write(1, slices(3));
  queue.add_write(2, slices(3));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x3 w2x1 ");
  EXPECT_EQ(queue.in_flight(), 4U);
  EXPECT_FALSE(queue.post(backend));
  EXPECT_TRUE(queue.landed(1, 3));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x3 w2x1 w2x2 ");
  EXPECT_FALSE(queue.landed(2, 2));
  EXPECT_TRUE(queue.landed(2, 1));
  EXPECT_EQ(queue.in_flight(), 0U);
  EXPECT_EQ(queue.outstanding(), 0U);
}

TEST(TransferQueue, WaitsForTheMarkOfItsFront) {
  RecordingBackend backend;
  CountingMarks marks;
  TransferQueue queue(1, 100, marks);
  queue.add_write(1, slices(2), {}, 7);
  queue.add_signal(5);
  queue.add_write(2, slices(1));
  EXPECT_FALSE(queue.post(backend));
  EXPECT_TRUE(queue.waits_for_mark());
  marks.reached_mark = 7;
  EXPECT_FALSE(queue.waits_for_mark());
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x2 s5 w2x1 ");
}

TEST(TransferQueue, DropsWhatIsNotPosted) {
  RecordingBackend backend;
  CountingMarks marks;
  TransferQueue queue(1, 2, marks);
  queue.add_write(1, slices(4));
  queue.add_write(2, slices(1), 8, 7);
  queue.add_write(3, slices(1));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_FALSE(queue.drop(1)) << "half of it is posted";
  EXPECT_TRUE(queue.drop(2));
  EXPECT_FALSE(queue.drop(2));
  EXPECT_FALSE(queue.landed(1, 2));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_TRUE(queue.landed(1, 2));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x2 w1x2 w3x1 ");
  EXPECT_EQ(queue.abandon(), std::vector<TransferId>{3});
}

TEST(TransferQueue, OffersTheRestAgainWhenTheBackendIsFull) {
  RecordingBackend backend;
  TransferQueue queue(1, 100, kNoMarks);
  queue.add_write(1, slices(5));
  backend.room = 2;
  EXPECT_TRUE(queue.post(backend));
  EXPECT_FALSE(queue.post(backend));
  backend.room = 9;
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x2 w1x3 ");
}

TEST(TransferQueue, SignalsStayBehindEarlierWrites) {
  RecordingBackend backend;
  TransferQueue queue(1, 2, kNoMarks);
  queue.add_signal(7);
  queue.add_write(1, slices(3));
  queue.add_signal(8);
  queue.post(backend);
  EXPECT_EQ(backend.log.str(), "s7 w1x2 ");
  EXPECT_FALSE(queue.landed(1, 2));
  queue.post(backend);
  EXPECT_EQ(backend.log.str(), "s7 w1x2 w1x1 s8 ");
}

TEST(TransferQueue, AbandonNamesWhatDidNotComplete) {
  RecordingBackend backend;
  TransferQueue queue(1, 2, kNoMarks);
  queue.add_write(1, slices(1));
  queue.add_write(2, slices(5));
  queue.add_write(3, slices(1));
  queue.post(backend);
  EXPECT_TRUE(queue.landed(1, 1));
  EXPECT_EQ(queue.abandon(), (std::vector<TransferId>{2, 3}));
  EXPECT_TRUE(queue.abandon().empty());
  EXPECT_FALSE(queue.post(backend));
}

TEST(TransferQueue, KnowsWhichRegionsItReads) {
  TransferQueue queue(1, 2, kNoMarks);
  queue.add_write(1, slices(2, 5));
  EXPECT_TRUE(queue.reads_from(5));
  EXPECT_FALSE(queue.reads_from(4));
}

TEST(TransferQueue, OffersTheSignalWithTheLastSlicesOnly) {
  RecordingBackend backend;
  backend.fuses = true;
  TransferQueue queue(1, 4, kNoMarks);
  queue.add_write(1, slices(6), 7);
  queue.add_signal(8);
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x4 ");
  EXPECT_FALSE(queue.landed(1, 4));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x4 w1x2 +s7 s8 ");
}

TEST(TransferQueue, SignalsOnItsOwnWhereTheBackendDoesNot) {
  RecordingBackend backend;
  TransferQueue queue(1, 4, kNoMarks);
  queue.add_write(1, slices(2), 7);
  queue.add_write(2, slices(1));
  EXPECT_TRUE(queue.post(backend));
  EXPECT_EQ(backend.log.str(), "w1x2 s7 w2x1 ");
}

}  // namespace
}  // namespace rkv
