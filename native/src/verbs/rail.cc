// SPDX-License-Identifier: Apache-2.0
#include "verbs/rail.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string_view>

#include "core/error.h"

namespace rkv::verbs {
namespace {

constexpr const char* kSeeKernelLog = "see the kernel log";

bool set_nonblocking(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

/// The devices that the library sees, for as long as this lives.
class DeviceList {
 public:
  explicit DeviceList(const Ibverbs& lib) : lib_(lib), list_(lib.get_device_list(&count_)) {
    if (list_ == nullptr) throw_errno("ibv_get_device_list", errno, "load the ib_uverbs module");
  }
  DeviceList(const DeviceList&) = delete;
  DeviceList& operator=(const DeviceList&) = delete;
  ~DeviceList() { lib_.free_device_list(list_); }

  [[nodiscard]] ibv_device* find(std::string_view name) const {
    for (int i = 0; i < count_; ++i) {
      if (name == lib_.get_device_name(list_[i])) return list_[i];
    }
    return nullptr;
  }

 private:
  const Ibverbs& lib_;
  int count_ = 0;
  ibv_device** list_;
};

}  // namespace

Rail::Rail(const Ibverbs& lib, const std::string& device, std::uint8_t port)
    : lib_(lib), name_(device + ":" + std::to_string(port)), port_(port) {
  open(device);
  create_queues();
  free_cqes_ = static_cast<std::uint32_t>(send_cq_->cqe);
  // A CQE each, at most.
  const std::uint32_t receives =
      std::min({kSrqDepth, static_cast<std::uint32_t>(limits_.max_srq_wr),
                static_cast<std::uint32_t>(receive_cq_->cqe)});
  receive_batch_ = std::min(kSrqBatch, (receives + 1) / 2);
  post_receives(receives);
}

void Rail::fail(const char* call, int errnum, const char* remedy) const {
  throw_errno(std::string(call) + "(" + name_ + ")", errnum, remedy);
}

void Rail::open(const std::string& device) {
  const DeviceList devices(lib_);
  ibv_device* found = devices.find(device);
  if (found == nullptr) {
    fail("ibv_get_device_list", ENODEV,
         "sysfs has the device but libibverbs does not: install its provider (ibverbs-providers)");
  }
  context_ = {lib_.open_device(found), Release{&lib_}};
  if (!context_) {
    fail("ibv_open_device", errno,
         "make /dev/infiniband/uverbs* readable and writable for this user, and pass it into the "
         "container");
  }
  if (!set_nonblocking(context_->async_fd)) fail("fcntl(async_fd)", errno, kSeeKernelLog);
  if (const int error = lib_.query_device(context_.get(), &limits_)) {
    fail("ibv_query_device", error, kSeeKernelLog);
  }
  if (const int error = lib_.query_port(context_.get(), port_, &port_attributes_)) {
    fail("ibv_query_port", error, kSeeKernelLog);
  }
}

void Rail::create_queues() {
  pd_ = {lib_.alloc_pd(context_.get()), Release{&lib_}};
  if (!pd_) fail("ibv_alloc_pd", errno, kSeeKernelLog);
  channel_ = {lib_.create_comp_channel(context_.get()), Release{&lib_}};
  if (!channel_ || !set_nonblocking(channel_->fd)) {
    fail("ibv_create_comp_channel", errno, "raise `ulimit -n`");
  }
  const auto create_cq = [this](std::uint32_t wanted) {
    const int depth =
        static_cast<int>(std::min(wanted, static_cast<std::uint32_t>(limits_.max_cqe)));
    Handle<ibv_cq> cq{lib_.create_cq(context_.get(), depth, nullptr, channel_.get(), 0),
                      Release{&lib_}};
    if (!cq) fail("ibv_create_cq", errno, "raise `ulimit -l` (memlock)");
    return cq;
  };
  send_cq_ = create_cq(kSendCqDepth);
  receive_cq_ = create_cq(kSrqDepth);
  // Signals carry no bytes, so a receive needs no memory; some providers insist on one SGE.
  ibv_srq_init_attr attributes{};
  attributes.attr.max_wr = std::min(kSrqDepth, static_cast<std::uint32_t>(limits_.max_srq_wr));
  attributes.attr.max_sge = 1;
  srq_ = {lib_.create_srq(pd_.get(), &attributes), Release{&lib_}};
  if (!srq_) fail("ibv_create_srq", errno, "raise `ulimit -l` (memlock)");
}

std::size_t Rail::poll(ibv_cq* cq, std::span<ibv_wc> wcs) {
  const int n = ibv_poll_cq(cq, static_cast<int>(wcs.size()), wcs.data());
  if (n < 0) fail("ibv_poll_cq", EIO, kSeeKernelLog);
  return static_cast<std::size_t>(n);
}

void Rail::arm() {
  if (armed_) return;
  for (ibv_cq* cq : {send_cq_.get(), receive_cq_.get()}) {
    if (const int error = ibv_req_notify_cq(cq, 0)) fail("ibv_req_notify_cq", error, kSeeKernelLog);
  }
  armed_ = true;
}

void Rail::take_completion_events() {
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  while (lib_.get_cq_event(channel_.get(), &cq, &context) == 0) lib_.ack_cq_events(cq, 1);
  armed_ = false;
}

void Rail::recycle_receives(std::uint32_t n) {
  consumed_receives_ += n;
  while (consumed_receives_ >= receive_batch_) {
    post_receives(receive_batch_);
    consumed_receives_ -= receive_batch_;
  }
}

void Rail::post_receives(std::uint32_t n) {
  std::array<ibv_recv_wr, kSrqBatch> batch{};
  for (std::uint32_t i = 0; i < kSrqBatch; ++i) batch[i].next = &batch[i] + 1;
  while (n > 0) {
    const std::uint32_t now = std::min(n, kSrqBatch);
    batch[now - 1].next = nullptr;
    ibv_recv_wr* bad = nullptr;
    if (const int error = ibv_post_srq_recv(srq_.get(), batch.data(), &bad)) {
      fail("ibv_post_srq_recv", error, kSeeKernelLog);
    }
    n -= now;
  }
}

}  // namespace rkv::verbs
