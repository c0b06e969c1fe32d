// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/types.h"
#include "verbs/ibverbs.h"

namespace rkv::verbs {

constexpr std::uint32_t kSendCqDepth = 16384;  ///< CQEs; bounds the WRs outstanding on one rail.
constexpr std::uint32_t kSrqDepth = 4096;      ///< Receives posted for signals of all peers.
constexpr std::uint32_t kSrqBatch = 64;        ///< Receives reposted with one call.

/// An opened port and what all QPs on it share: PD, a CQ for sends, a CQ and an SRQ for signals,
/// one completion channel. Progress thread only, but for construction and what is const.
class Rail {
 public:
  /// Opens `device`. Receives are posted before this returns.
  /// @throw std::runtime_error with call, device, errno and remedy.
  Rail(const Ibverbs& lib, const std::string& device, std::uint8_t port);
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  [[nodiscard]] const Ibverbs& lib() const { return lib_; }
  [[nodiscard]] const std::string& name() const { return name_; }  ///< "mlx5_0:1"
  [[nodiscard]] std::uint8_t port() const { return port_; }
  [[nodiscard]] const ibv_port_attr& port_attributes() const { return port_attributes_; }
  [[nodiscard]] const ibv_device_attr& limits() const { return limits_; }
  [[nodiscard]] ibv_pd* pd() const { return pd_.get(); }
  [[nodiscard]] ibv_cq* send_cq() const { return send_cq_.get(); }
  [[nodiscard]] ibv_cq* receive_cq() const { return receive_cq_.get(); }
  [[nodiscard]] ibv_srq* srq() const { return srq_.get(); }
  [[nodiscard]] int completion_fd() const { return channel_->fd; }
  [[nodiscard]] int async_fd() const { return context_->async_fd; }

  /// WRs that may still be posted on this rail: after an error every outstanding WR makes a CQE,
  /// signalled or not, and the CQ must hold them all.
  [[nodiscard]] std::uint32_t free_cqes() const { return free_cqes_; }
  void take_cqes(std::uint32_t n) { free_cqes_ -= n; }
  void return_cqes(std::uint32_t n) { free_cqes_ += n; }

  /// Up to `wcs.size()` completions. @throw std::runtime_error when the CQ itself is broken.
  [[nodiscard]] std::size_t poll(ibv_cq* cq, std::span<ibv_wc> wcs);
  /// Takes one event off async_fd(), which the caller acknowledges. @return false: none.
  [[nodiscard]] bool take_async_event(ibv_async_event& event) const {
    return lib_.get_async_event(context_.get(), &event) == 0;
  }
  /// Makes the completion channel readable at the next completion.
  void arm();
  /// Takes what arm() asked for off the channel.
  void take_completion_events();
  /// Says that `n` receives were consumed; they are posted again in batches.
  void recycle_receives(std::uint32_t n);

 private:
  void open(const std::string& device);
  void create_queues();
  void post_receives(std::uint32_t n);
  [[noreturn]] void fail(const char* call, int errnum, const char* remedy) const;

  const Ibverbs& lib_;
  std::string name_;
  std::uint8_t port_;
  // In this order: each needs those above it.
  Handle<ibv_context> context_;
  Handle<ibv_pd> pd_;
  Handle<ibv_comp_channel> channel_;
  Handle<ibv_cq> send_cq_;
  Handle<ibv_cq> receive_cq_;
  Handle<ibv_srq> srq_;
  ibv_device_attr limits_{};
  ibv_port_attr port_attributes_{};
  std::uint32_t free_cqes_ = 0;
  std::uint32_t receive_batch_ = 1;  // at most half of all: a peer must find some meanwhile
  std::uint32_t consumed_receives_ = 0;
  bool armed_ = false;
};

}  // namespace rkv::verbs
