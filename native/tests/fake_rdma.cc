// SPDX-License-Identifier: Apache-2.0
#include "fake_rdma.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "fake_objects.h"

namespace rkv::verbs {
namespace {

std::mutex registry_mutex;
std::vector<FakeFabric::State*> registry;

std::vector<ibv_gid> default_gids(std::size_t number) {
  ibv_gid link_local{};
  link_local.raw[0] = 0xfe;
  link_local.raw[1] = 0x80;
  link_local.raw[15] = static_cast<std::uint8_t>(number);
  ibv_gid mapped{};  // An IPv4 address as a RoCE v2 GID: ::ffff:10.0.0.N.
  mapped.raw[10] = mapped.raw[11] = 0xff;
  mapped.raw[12] = 10;
  mapped.raw[15] = static_cast<std::uint8_t>(number);
  return {link_local, mapped};
}

void set_up(fake::Device& device, FakeDeviceOptions options, std::size_t number) {
  if (options.gids.empty()) options.gids = default_gids(number);
  if (options.lid == 0 && options.link_layer == IBV_LINK_LAYER_INFINIBAND) {
    options.lid = static_cast<std::uint16_t>(number);
  }
  device.node_type = IBV_NODE_CA;
  device.transport_type = IBV_TRANSPORT_IB;
  std::snprintf(device.name, sizeof device.name, "%s", options.name.c_str());
  std::snprintf(device.dev_name, sizeof device.dev_name, "uverbs%zu", number - 1);
  device.options = std::move(options);
}

void set_port(FakeFabric::State& state, const std::string& name, bool up) {
  const std::lock_guard lock(state.mutex);
  fake::Device& device = state.device(name);
  if (device.port_up == up) return;
  device.port_up = up;
  fake::raise_event(device, up ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR);
  fake::settle(state);
}

FakeCounters count(const fake::Device& device) {
  FakeCounters sum = device.destroyed;
  for (const auto& [number, qp] : device.qps) fake::add(sum, qp->tallies.read());
  return sum;
}

}  // namespace

namespace fake {

FakeCounters Tallies::read() const {
  FakeCounters counters{.wrs = wrs.get(),
                        .doorbells = doorbells.get(),
                        .signaled = signaled.get(),
                        .inlined = inlined.get(),
                        .bytes = bytes.get(),
                        .max_sq_occupancy = max_sq_occupancy.get()};
  for (std::size_t i = 0; i < sges.size(); ++i) counters.sges[i] = sges[i].get();
  return counters;
}

void add(FakeCounters& sum, const FakeCounters& more) {
  sum.wrs += more.wrs;
  sum.doorbells += more.doorbells;
  sum.signaled += more.signaled;
  sum.inlined += more.inlined;
  sum.bytes += more.bytes;
  sum.max_sq_occupancy = std::max(sum.max_sq_occupancy, more.max_sq_occupancy);
  for (std::size_t i = 0; i < sum.sges.size(); ++i) sum.sges[i] += more.sges[i];
}

ibv_device** get_device_list(int* count) {
  const std::lock_guard registry_lock(registry_mutex);
  if (registry.empty()) return fail_with<ibv_device*>(ENOSYS);  // As without ib_uverbs.
  Fabric& fabric = *registry.back();
  const std::lock_guard lock(fabric.mutex);
  // A slot before the list tells free_device_list() the fabric; a null ends it.
  auto* list = new ibv_device*[fabric.devices.size() + 2]();
  list[0] = &fabric.devices.front();
  for (std::size_t i = 0; i < fabric.devices.size(); ++i) list[i + 1] = &fabric.devices[i];
  if (count != nullptr) *count = static_cast<int>(fabric.devices.size());
  ++fabric.live_objects;
  return list + 1;
}

void free_device_list(ibv_device** list) {
  Fabric& fabric = *static_cast<Device*>(list[-1])->fabric;
  const std::lock_guard lock(fabric.mutex);
  --fabric.live_objects;
  delete[] (list - 1);
}

}  // namespace fake

FakeFabric::State::State(FakeOptions given) : options(std::move(given)), random(options.seed) {
  if (options.devices.empty()) throw std::invalid_argument("a fabric needs a device");
  for (const FakeDeviceOptions& device : options.devices) {
    devices.emplace_back().fabric = this;
    set_up(devices.back(), device, devices.size());
  }
  thread = std::thread([this] { run(); });
}

FakeFabric::State::~State() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
    changed.notify_one();
  }
  thread.join();
}

fake::Device& FakeFabric::State::device(const std::string& name) {
  for (fake::Device& device : devices) {
    if (device.options.name == name) return device;
  }
  throw std::invalid_argument("the fabric has no device " + name);
}

void FakeFabric::State::wake_at(fake::Clock::time_point when) {
  if (when >= wake) return;
  wake = when;
  changed.notify_one();
}

void FakeFabric::State::run() {
  std::unique_lock lock(mutex);
  while (!stopping) {
    wake = fake::Clock::now() + std::chrono::hours(1);
    fake::settle_all(*this);
    while (!stopping && fake::Clock::now() < wake) changed.wait_until(lock, wake);
  }
}

FakeFabric::FakeFabric(FakeOptions options) : state_(std::make_unique<State>(std::move(options))) {
  const std::lock_guard lock(registry_mutex);
  registry.push_back(state_.get());
}

FakeFabric::~FakeFabric() {
  const std::lock_guard lock(registry_mutex);
  std::erase(registry, state_.get());
}

ibv_gid FakeFabric::gid(const std::string& device, std::size_t index) const {
  const std::lock_guard lock(state_->mutex);
  return state_->device(device).options.gids.at(index);
}

void FakeFabric::fail_next(const ibv_qp* qp, ibv_wc_status status) {
  const std::lock_guard lock(state_->mutex);
  fake::qp_of(const_cast<ibv_qp*>(qp)).fail_next = status;
}

void FakeFabric::fail_next(const std::string& device, ibv_wc_status status) {
  const std::lock_guard lock(state_->mutex);
  state_->device(device).fail_next = status;
}

void FakeFabric::fail_next_reg_mr(const std::string& device, int error, int times) {
  const std::lock_guard lock(state_->mutex);
  state_->device(device).reg_mr_error = error;
  state_->device(device).reg_mr_failures = times;
}

void FakeFabric::drop_all_from(const std::string& device, bool on) {
  const std::lock_guard lock(state_->mutex);
  state_->device(device).dropping = on;
  fake::settle(*state_);
}

void FakeFabric::stall(const std::string& device, bool on) {
  const std::lock_guard lock(state_->mutex);
  state_->device(device).stalled = on;
  fake::settle(*state_);
}

void FakeFabric::port_down(const std::string& device) { set_port(*state_, device, false); }
void FakeFabric::port_up(const std::string& device) { set_port(*state_, device, true); }

FakeCounters FakeFabric::counters() const {
  const std::lock_guard lock(state_->mutex);
  FakeCounters sum;
  for (const fake::Device& device : state_->devices) fake::add(sum, count(device));
  return sum;
}

FakeCounters FakeFabric::counters(const std::string& device) const {
  const std::lock_guard lock(state_->mutex);
  return count(state_->device(device));
}

std::size_t FakeFabric::live_objects() const {
  const std::lock_guard lock(state_->mutex);
  return state_->live_objects;
}

bool FakeFabric::overflowed() const {
  const std::lock_guard lock(state_->mutex);
  return state_->overflowed;
}

}  // namespace rkv::verbs
