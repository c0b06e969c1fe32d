// SPDX-License-Identifier: Apache-2.0
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>

#include "backends/backends.h"
#include "bindings.h"
#include "columns.h"
#include "core/engine.h"

namespace py = pybind11;

namespace rkv::python {
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

/// Owns a registration, and with it a share of the engine.
class LocalMemory {
 public:
  LocalMemory(std::shared_ptr<Engine> engine, RegisteredMemory memory)
      : engine_(std::move(engine)), memory_(std::move(memory)) {}
  LocalMemory(const LocalMemory&) = delete;
  LocalMemory& operator=(const LocalMemory&) = delete;
  ~LocalMemory() { close(); }

  [[nodiscard]] const RegisteredMemory& memory() const { return memory_; }
  void close() {
    if (const auto engine = std::exchange(engine_, nullptr)) engine->deregister_memory(memory_.id);
  }

 private:
  std::shared_ptr<Engine> engine_;
  RegisteredMemory memory_;
};

std::shared_ptr<Engine> make_engine(const EngineConfig& config, std::uint64_t incarnation) {
  return std::make_shared<Engine>(config, incarnation, create_backend(config), create_marks());
}

std::unique_ptr<LocalMemory> register_memory(const std::shared_ptr<Engine>& engine,
                                             std::uint64_t ptr, std::uint64_t nbytes,
                                             const std::string& kind, bool peer_writable) {
  const MemoryUse use{.kind = memory_kind(kind, "register_memory()"),
                      .peer_writable = peer_writable};
  return std::make_unique<LocalMemory>(engine, engine->register_memory({ptr, nbytes}, use));
}

TransferId write(Engine& engine, PeerId peer, const Column& src, const Column& dst,
                 const Column& nbytes, std::optional<std::uint32_t> imm, Mark after) {
  const auto local = column_span(src, "src");
  const auto remote = column_span(dst, "dst");
  const auto length = column_span(nbytes, "nbytes");
  const py::gil_scoped_release release;
  return engine.write(peer, local, remote, length, imm, after);
}

void connect(Engine& engine, PeerId peer, const py::bytes& descriptor,
             const std::vector<py::bytes>& memory) {
  const std::vector<Bytes> regions(memory.begin(), memory.end());
  const std::string endpoint = descriptor;
  const py::gil_scoped_release release;
  engine.connect(peer, endpoint, regions);
}

void send(Engine& engine, PeerId peer, const py::bytes& data) {
  Bytes message = data;
  const py::gil_scoped_release release;
  engine.send(peer, std::move(message));
}

bool wait(Engine& engine, double timeout_s) {
  if (!(timeout_s >= 0)) throw std::invalid_argument("wait(): timeout_s must not be negative");
  constexpr double kLongest = 1e6;  // seconds; the clock overflows far beyond
  return engine.wait(std::chrono::duration<double>(std::min(timeout_s, kLongest)));
}

void register_handles(py::module_& module) {
  py::class_<Path>(module, "Path", "The way to a peer.")
      .def_readonly("backend", &Path::backend, "'verbs', 'cuda_ipc' or 'tcp'.")
      .def_readonly("description", &Path::description, "For people.")
      .def_readonly(
          "warning", &Path::warning,
          "Why it is slower than the hardware allows and what to do; empty if it is not.");
  py::class_<LocalMemory>(module, "LocalMemory", "Registered memory; see Engine.register_memory().")
      .def_property_readonly(
          "descriptor", [](const LocalMemory& self) { return py::bytes(self.memory().descriptor); },
          "Bytes for the peers that shall write into this memory.")
      .def_property_readonly("ptr",
                             [](const LocalMemory& self) { return self.memory().range.address; })
      .def_property_readonly("nbytes",
                             [](const LocalMemory& self) { return self.memory().range.nbytes; })
      .def(
          "close", &LocalMemory::close, ReleaseGil(),
          "Fence: when it returns nothing can land in the memory any more. Peers with a write half "
          "done into it, or outstanding out of it, are lost. Also done on collection.");
  py::class_<CreatedEndpoint>(module, "Endpoint", "This side of one connection to be made.")
      .def_readonly("peer", &CreatedEndpoint::peer, "Names the peer in all calls and events.")
      .def_property_readonly(
          "descriptor", [](const CreatedEndpoint& self) { return py::bytes(self.descriptor); },
          "Bytes for exactly one peer's connect(); whoever holds them may connect.");
}

}  // namespace

void register_engine(py::module_& module) {
  register_handles(module);
  py::class_<Engine, std::shared_ptr<Engine>>(
      module, "Engine",
      "Writes into the memory of peers, and lets peers write into registered memory.\n\n"
      "One progress thread does the work; every method may be called from any thread. After "
      "close() all but poll(), wait() and close() raise RuntimeError.")
      .def(py::init(&make_engine), py::arg("config"), py::arg("incarnation"), ReleaseGil(),
           "Starts the progress thread and listens on config.bind_host.\n\n"
           "`incarnation` (u64, not 0) tells this engine from its predecessors. Raises ValueError "
           "for an unknown backend or incarnation 0, RuntimeError with the reason for a backend "
           "that is not usable here.")
      .def_property_readonly("backend", &Engine::backend)
      .def_property_readonly("incarnation", &Engine::incarnation)
      .def_property_readonly("description", &Engine::describe,
                             "What the backend uses and why, for people: devices, ports, GIDs.")
      .def("register_memory", &register_memory, py::arg("ptr"), py::arg("nbytes"),
           py::arg("kind") = "host", py::arg("peer_writable") = true, ReleaseGil(),
           "Makes [ptr, ptr + nbytes) a source of writes and, if `peer_writable`, a target of "
           "peers.\n\n"
           "`kind` is 'host' or 'cuda'. The caller keeps it mapped until LocalMemory.close(). May "
           "take seconds (pages are pinned). Raises ValueError for an empty range or a kind that "
           "the backend cannot reach, RuntimeError with call, errno and remedy.")
      .def("create_endpoint", &Engine::create_endpoint, py::arg("label"), ReleaseGil(),
           "One endpoint for one peer. `label`, such as 'decode-0/0', only names it in texts.")
      .def(
          "connect", &connect, py::arg("peer"), py::arg("descriptor"), py::arg("memory"),
          "Connects an endpoint to the peer's endpoint `descriptor`; `memory` lists descriptors of "
          "the peer's memory.\n\n"
          "Asynchronous, called by both sides at their own time; CONNECTED or PEER_LOST follows. "
          "Writes and signals queued meanwhile go out once connected. Raises ValueError naming "
          "what is wrong with a descriptor.")
      .def(
          "write", &write, py::arg("peer"), py::arg("src").noconvert(), py::arg("dst").noconvert(),
          py::arg("nbytes").noconvert(), py::arg("imm") = py::none(), py::arg("after") = 0,
          "Queues one transfer of n ranges and returns its id (> 0).\n\n"
          "Three int64 arrays of shape (n,), C-contiguous: local addresses, addresses at the "
          "peer, bytes. Adjacent rows are joined, long runs sliced to block_size. Never blocks and "
          "never fails for want of room; ends in exactly one TRANSFER_DONE or TRANSFER_FAILED, "
          "until when the source bytes must not change. They are read once the mark `after` is "
          "reached. Raises ValueError naming the first row "
          "outside registered memory, RuntimeError when the peer is lost or connect() was not "
          "called.")
      .def("mark", &Engine::mark, py::arg("stream"), ReleaseGil(),
           "A mark (> 0) behind all work that a CUDA stream was given by now.\n\n"
           "`stream` is the raw handle, as torch.cuda.current_stream().cuda_stream. Takes the "
           "stream one small memory operation. Raises RuntimeError without a GPU.")
      .def("reached", &Engine::reached, py::arg("mark"),
           "Whether the stream has come to the mark. No call of the driver.")
      .def("cancel", &Engine::cancel, py::arg("peer"), py::arg("ids"), ReleaseGil(),
           "Ends those of these writes of which nothing is posted yet, such as those that wait for "
           "a mark, in TRANSFER_FAILED at once and without their signals.\n\n"
           "The others end as they would. A peer that was closed is ignored.")
      .def("signal", &Engine::signal, py::arg("peer"), py::arg("imm"), ReleaseGil(),
           "Queues an IMM event (u32) for the peer, delivered after every earlier write to it has "
           "landed. Signals keep their order.")
      .def("send", &send, py::arg("peer"), py::arg("data"),
           "Queues a message of at most 1 MiB. Messages keep their order among themselves and have "
           "none against writes and signals.")
      .def("poll", &Engine::poll, py::arg("max_events") = 256, ReleaseGil(),
           "The oldest events, at most `max_events`, without blocking.")
      .def("wait", &wait, py::arg("timeout_s"), ReleaseGil(),
           "True as soon as an event is queued, False after `timeout_s` seconds without one.")
      .def("close_peer", &Engine::close_peer, py::arg("peer"), ReleaseGil(),
           "Fence: when it returns nothing of that peer can land, and its outstanding writes have "
           "their TRANSFER_FAILED. A peer already closed is ignored.")
      .def("stats", &Engine::stats, ReleaseGil(),
           "Counters since the start, and seconds spent posting.")
      .def("peer_stats", &Engine::peer_stats, py::arg("peer"), ReleaseGil(),
           "Counters of one peer. Raises ValueError for a closed one.")
      .def("peer_path", &Engine::peer_path, py::arg("peer"), ReleaseGil(),
           "The way to a connected peer. Raises ValueError for a closed one, RuntimeError for one "
           "that is not connected.")
      .def("close", &Engine::close, ReleaseGil(),
           "Tells the peers, fences them, fails outstanding writes and joins the progress thread. "
           "Idempotent.");
}

}  // namespace rkv::python
