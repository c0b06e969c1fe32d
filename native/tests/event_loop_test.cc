// SPDX-License-Identifier: Apache-2.0
#include "core/event_loop.h"

#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <array>
#include <atomic>
#include <thread>

namespace rkv {
namespace {

using std::chrono::milliseconds;

struct SocketPair {
  UniqueFd near;
  UniqueFd far;
  SocketPair() {
    std::array<int, 2> fds{};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds.data()), 0);
    near = UniqueFd(fds[0]);
    far = UniqueFd(fds[1]);
  }
  void ring() const { EXPECT_EQ(send(far.get(), "x", 1, 0), 1); }
};

TEST(EventLoop, PostWakesASleepingLoop) {
  EventLoop loop;
  std::atomic<int> ran = 0;
  std::thread poster([&] {
    for (int i = 0; i < 1000; ++i) loop.post([&] { ++ran; });
  });
  // No post may be lost between two sleeps; a lost one would cost the full second.
  Turn turn;
  std::unique_lock lock(turn);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (ran < 1000 && std::chrono::steady_clock::now() < deadline) {
    loop.run_once(milliseconds(1000), lock);
  }
  poster.join();
  EXPECT_EQ(ran, 1000);
}

TEST(EventLoop, HandlerMayUnwatchItselfAndOthersOfTheSameBatch) {
  EventLoop loop;
  const SocketPair a;
  const SocketPair b;
  int calls = 0;
  const auto first_wins = [&](std::uint32_t) {
    ++calls;
    loop.unwatch(a.near.get());
    loop.unwatch(b.near.get());
  };
  loop.watch(a.near.get(), EPOLLIN, first_wins);
  loop.watch(b.near.get(), EPOLLIN, first_wins);
  a.ring();
  b.ring();
  Turn turn;
  std::unique_lock lock(turn);
  loop.run_once(milliseconds(1000), lock);
  loop.run_once(milliseconds(0), lock);
  EXPECT_EQ(calls, 1);
}

TEST(EventLoop, ReportsWhetherAnythingRan) {
  EventLoop loop;
  Turn turn;
  std::unique_lock lock(turn);
  EXPECT_FALSE(loop.run_once(milliseconds(1), lock).handlers);
  loop.post([] {});
  const EventLoop::Ran ran = loop.run_once(milliseconds(1000), lock);
  EXPECT_TRUE(ran.commands);
  EXPECT_FALSE(ran.handlers);
}

}  // namespace
}  // namespace rkv
