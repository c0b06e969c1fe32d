// SPDX-License-Identifier: Apache-2.0
#include "cuda/ipc_memory.h"

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <stdexcept>

#include "core/endpoint_descriptor.h"
#include "core/error.h"
#include "core/text.h"

namespace rkv::cuda {
namespace {

enum class Kind : std::uint8_t { kIpcHandle = 1, kFileDescriptors = 2 };

/// The machine as booted: containers of one host share it, other hosts do not.
std::array<std::uint64_t, 2> boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  file >> text;
  std::erase(text, '-');
  if (text.size() != 32) return {random_u64(), random_u64()};  // nobody's
  return {std::stoull(text.substr(0, 16), nullptr, 16), std::stoull(text.substr(16), nullptr, 16)};
}

std::uint64_t this_process() {
  static const std::uint64_t id = random_u64();
  return id;
}

class IpcMapping final : public Mapping {
 public:
  IpcMapping(const Gpu& gpu, const IpcMemHandle& handle) : gpu_(gpu) {
    const Current current(gpu.cuda(), gpu.context());
    check(gpu.cuda(), gpu.cuda().ipc_open_mem_handle(&base_, handle, kLazyEnablePeerAccess),
          "cuIpcOpenMemHandle()",
          "the two processes must see the same GPUs (CUDA_VISIBLE_DEVICES, cgroups), and in "
          "containers share the IPC and PID namespace (docker --ipc=host --pid=host)");
  }
  ~IpcMapping() override {
    const Current current(gpu_.cuda(), gpu_.context());
    gpu_.cuda().ipc_close_mem_handle(base_);
  }
  [[nodiscard]] DevicePtr base() const { return base_; }

 private:
  const Gpu& gpu_;
  DevicePtr base_ = 0;
};

/// Pieces of virtual memory, mapped one behind the other as they are at their owner.
class PiecesMapping final : public Mapping {
 public:
  PiecesMapping(const Gpu& gpu, std::uint64_t nbytes) : gpu_(gpu), nbytes_(nbytes) {
    const Current current(gpu.cuda(), gpu.context());
    check(gpu.cuda(), gpu.cuda().mem_address_reserve(&base_, nbytes, 0, 0, 0),
          "cuMemAddressReserve()");
  }
  ~PiecesMapping() override {
    const Cuda& cuda = gpu_.cuda();
    const Current current(cuda, gpu_.context());
    if (mapped_ > 0) cuda.mem_unmap(base_, mapped_);
    cuda.mem_address_free(base_, nbytes_);
  }
  void add(int fd, std::uint64_t nbytes) {
    const Cuda& cuda = gpu_.cuda();
    const Current current(cuda, gpu_.context());
    AllocationHandle handle = 0;
    check(
        cuda,
        cuda.mem_import_from_shareable_handle(
            &handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)), kPosixFileDescriptor),
        "cuMemImportFromShareableHandle()");
    const Result mapped = cuda.mem_map(base_ + mapped_, nbytes, 0, handle, 0);
    cuda.mem_release(handle);  // the mapping keeps it
    check(cuda, mapped, "cuMemMap()");
    mapped_ += nbytes;
  }
  void allow_access() {
    const Cuda& cuda = gpu_.cuda();
    const Current current(cuda, gpu_.context());
    const MemAccess access{.location = {.id = gpu_.device()}};
    check(cuda, cuda.mem_set_access(base_, nbytes_, &access, 1), "cuMemSetAccess()",
          "the GPUs must reach each other's memory: see nvidia-smi topo -p2p w");
  }
  [[nodiscard]] DevicePtr base() const { return base_; }

 private:
  const Gpu& gpu_;
  const std::uint64_t nbytes_;
  DevicePtr base_ = 0;
  std::uint64_t mapped_ = 0;
};

/// A copy of another process's file descriptor (Linux 5.6).
UniqueFd take_fd(int process_fd, std::uint32_t fd) {
  UniqueFd taken(static_cast<int>(syscall(SYS_pidfd_getfd, process_fd, fd, 0)));
  if (!taken) {
    throw_errno("pidfd_getfd()", errno,
                "prefill and decode must run as one user, and kernel.yama.ptrace_scope be 0 or 1");
  }
  return taken;
}

Export export_pieces(const Gpu& gpu, const MemoryRange& range) {
  const Cuda& cuda = gpu.cuda();
  Export made;
  ByteWriter pieces;
  std::uint64_t first = 0;
  std::uint32_t count = 0;
  std::uint64_t total = 0;
  for (std::uint64_t at = range.address; at < range.address + range.nbytes;) {
    DevicePtr base = 0;
    std::size_t nbytes = 0;
    check(cuda, cuda.mem_get_address_range(&base, &nbytes, at), "cuMemGetAddressRange()");
    AllocationHandle handle = 0;
    check(cuda,
          cuda.mem_retain_allocation_handle(
              &handle, reinterpret_cast<void*>(static_cast<std::uintptr_t>(at))),
          "cuMemRetainAllocationHandle(" + hex_text(at) + ")");
    std::uint64_t shared = 0;  // an int, by the driver's words
    const Result exported =
        cuda.mem_export_to_shareable_handle(&shared, handle, kPosixFileDescriptor, 0);
    cuda.mem_release(handle);
    check(cuda, exported, "cuMemExportToShareableHandle(" + hex_text(at) + ")",
          "this memory was not made for sharing; with PyTorch's expandable segments, set "
          "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False");
    made.fds.emplace_back(static_cast<int>(static_cast<std::uint32_t>(shared)));
    if (count == 0) first = base;
    pieces.put(static_cast<std::uint32_t>(made.fds.back().get()));
    pieces.put(std::uint64_t{nbytes});
    total += nbytes;
    ++count;
    at = base + nbytes;
  }
  ByteWriter writer;
  writer.put(static_cast<std::uint8_t>(Kind::kFileDescriptors));
  writer.put(range.address - first);
  writer.put(total);
  writer.put(count);
  writer.put_bytes(pieces.take());
  made.blob = writer.take();
  // Where Yama restricts ptrace, a process names who may take its descriptors: any of this user.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  return made;
}

}  // namespace

Exporter Exporter::here(const Gpu& gpu) {
  return {.boot_id = rkv::cuda::boot_id(),
          .process = this_process(),
          .pid = static_cast<std::uint32_t>(getpid()),
          .gpu = gpu.uuid()};
}

void Exporter::put(ByteWriter& writer) const {
  writer.put(boot_id[0]);
  writer.put(boot_id[1]);
  writer.put(process);
  writer.put(pid);
  writer.put_bytes({reinterpret_cast<const char*>(gpu.bytes.data()), gpu.bytes.size()});
}

Exporter Exporter::get(ByteReader& reader) {
  Exporter exporter;
  exporter.boot_id = {reader.get<std::uint64_t>("boot id"), reader.get<std::uint64_t>("boot id")};
  exporter.process = reader.get<std::uint64_t>("process");
  exporter.pid = reader.get<std::uint32_t>("pid");
  const std::string_view uuid = reader.get_bytes(exporter.gpu.bytes.size(), "GPU UUID");
  std::memcpy(exporter.gpu.bytes.data(), uuid.data(), uuid.size());
  return exporter;
}

Reach reach(const Gpu& gpu, const Exporter& here, const Exporter& peer) {
  const Cuda& cuda = gpu.cuda();
  if (peer.boot_id != here.boot_id) return {false, "the peer is on another host"};
  if (peer.gpu.bytes == here.gpu.bytes) return {true, "same GPU"};
  int count = 0;
  check(cuda, cuda.device_get_count(&count), "cuDeviceGetCount()");
  std::optional<int> found;
  for (int i = 0; i < count; ++i) {
    Uuid uuid{};
    if (cuda.device_get_uuid(&uuid, i) == kSuccess && uuid.bytes == peer.gpu.bytes) found = i;
  }
  if (!found) {
    return {false,
            "the peer's GPU is not visible to this process; let both engines see both GPUs "
            "(CUDA_VISIBLE_DEVICES, each engine's own first; Slurm: no --gpus-per-task binding)"};
  }
  const std::string pair =
      "GPU " + std::to_string(gpu.device()) + " to GPU " + std::to_string(*found);
  int can_access = 0;
  int atomics = 0;
  cuda.device_can_access_peer(&can_access, gpu.device(), *found);
  cuda.device_get_p2p_attribute(&atomics, kNativeAtomicSupported, gpu.device(), *found);
  if (can_access == 0) {
    return {false, pair +
                       ": no peer access; see nvidia-smi topo -p2p w (ACS or an IOMMU on the way "
                       "between the GPUs prevents it)"};
  }
  if (atomics == 0) {
    return {false, pair +
                       ": no atomics over this link, without which a peer cannot be fenced; "
                       "NVLink has them"};
  }
  return {true, pair + ", peer to peer"};
}

Export export_memory(const Gpu& gpu, const MemoryRange& range) {
  const Cuda& cuda = gpu.cuda();
  const Current current(cuda, gpu.context());
  IpcMemHandle handle{};
  const Result result = cuda.ipc_get_mem_handle(&handle, range.address);
  if (result != kSuccess) return export_pieces(gpu, range);
  DevicePtr base = 0;
  std::size_t nbytes = 0;
  check(cuda, cuda.mem_get_address_range(&base, &nbytes, range.address), "cuMemGetAddressRange()");
  if (!MemoryRange{base, nbytes}.contains(range.address, range.nbytes)) {
    throw std::runtime_error("register_memory(): " + range.text() +
                             " is not within one allocation, which is " +
                             MemoryRange{base, nbytes}.text());
  }
  ByteWriter writer;
  writer.put(static_cast<std::uint8_t>(Kind::kIpcHandle));
  writer.put(range.address - base);
  writer.put(std::uint64_t{nbytes});
  writer.put_bytes({handle.reserved.data(), handle.reserved.size()});
  return {writer.take(), {}};
}

Mapped Mapper::map(const Exporter& peer, const Bytes& blob, std::uint64_t nbytes) {
  ByteReader reader(blob);
  const auto kind = static_cast<Kind>(reader.get<std::uint8_t>("kind of memory"));
  const auto offset = reader.get<std::uint64_t>("offset");
  const auto total = reader.get<std::uint64_t>("size");
  if (offset > total || nbytes > total - offset) throw FormatError("a region beyond its memory");
  // The rest names the allocation, within the process that has it.
  ByteWriter name;
  name.put(peer.process);
  name.put_bytes(blob.substr(1 + sizeof offset));
  std::weak_ptr<Mapping>& known = mappings_[name.take()];
  if (kind == Kind::kIpcHandle) {
    IpcMemHandle handle{};
    const std::string_view raw = reader.get_bytes(handle.reserved.size(), "IPC handle");
    std::memcpy(handle.reserved.data(), raw.data(), raw.size());
    reader.expect_end();
    auto mapping = std::dynamic_pointer_cast<IpcMapping>(known.lock());
    if (!mapping) known = mapping = std::make_shared<IpcMapping>(*gpu_, handle);
    return {mapping->base() + offset, mapping};
  }
  if (kind != Kind::kFileDescriptors) throw FormatError("an unknown kind of memory");
  auto mapping = std::dynamic_pointer_cast<PiecesMapping>(known.lock());
  if (mapping) return {mapping->base() + offset, mapping};
  mapping = std::make_shared<PiecesMapping>(*gpu_, total);
  const UniqueFd process(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
  if (!process) throw_errno("pidfd_open(" + std::to_string(peer.pid) + ")", errno);
  const auto count = reader.get<std::uint32_t>("number of pieces");
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto fd = reader.get<std::uint32_t>("descriptor");
    mapping->add(take_fd(process.get(), fd).get(), reader.get<std::uint64_t>("size of a piece"));
  }
  reader.expect_end();
  mapping->allow_access();
  known = mapping;
  return {mapping->base() + offset, mapping};
}

}  // namespace rkv::cuda
