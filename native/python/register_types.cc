// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>

#include <sstream>

#include "backends/backends.h"
#include "bindings.h"
#include "core/config.h"
#include "core/types.h"

namespace py = pybind11;

namespace rkv::python {
namespace {

EngineConfig make_config(std::string backend, std::string bind_host, std::string devices,
                         std::int64_t gid_index, std::string near, std::int64_t traffic_class,
                         std::int64_t service_level, std::int64_t block_size,
                         std::int64_t queue_depth, std::int64_t qps_per_peer, double peer_timeout_s,
                         double connect_timeout_s, std::int64_t spin_us, std::int64_t progress_cpu,
                         std::string link) {
  EngineConfig config{.backend = std::move(backend),
                      .bind_host = std::move(bind_host),
                      .devices = std::move(devices),
                      .gid_index = gid_index,
                      .near = std::move(near),
                      .traffic_class = traffic_class,
                      .service_level = service_level,
                      .block_size = block_size,
                      .queue_depth = queue_depth,
                      .qps_per_peer = qps_per_peer,
                      .peer_timeout_s = peer_timeout_s,
                      .connect_timeout_s = connect_timeout_s,
                      .spin_us = spin_us,
                      .progress_cpu = progress_cpu,
                      .link = std::move(link)};
  config.validate();
  return config;
}

void register_config(py::module_& module) {
  const EngineConfig defaults;
  py::class_<EngineConfig>(module, "EngineConfig", "Immutable settings of an Engine.")
      .def(py::init(&make_config), py::kw_only(), py::arg("backend") = defaults.backend,
           py::arg("bind_host") = defaults.bind_host, py::arg("devices") = defaults.devices,
           py::arg("gid_index") = defaults.gid_index, py::arg("near") = defaults.near,
           py::arg("traffic_class") = defaults.traffic_class,
           py::arg("service_level") = defaults.service_level,
           py::arg("block_size") = defaults.block_size,
           py::arg("queue_depth") = defaults.queue_depth,
           py::arg("qps_per_peer") = defaults.qps_per_peer,
           py::arg("peer_timeout_s") = defaults.peer_timeout_s,
           py::arg("connect_timeout_s") = defaults.connect_timeout_s,
           py::arg("spin_us") = defaults.spin_us, py::arg("progress_cpu") = defaults.progress_cpu,
           py::arg("link") = defaults.link,
           "Raises ValueError naming the field that is out of range.")
      .def_readonly("backend", &EngineConfig::backend,
                    "'auto' (the best usable one), 'tcp', 'verbs' or 'cuda_ipc'.")
      .def_readonly("bind_host", &EngineConfig::bind_host,
                    "Address or name that peers reach this engine at; never a wildcard.")
      .def_readonly("devices", &EngineConfig::devices,
                    "RDMA devices: 'auto', or names such as 'mlx5_0,mlx5_1:2' (device:port).")
      .def_readonly(
          "gid_index", &EngineConfig::gid_index,
          "GID table index of their ports; -1: RoCE v2 with an IPv4-mapped address first.")
      .def_readonly("near", &EngineConfig::near,
                    "Where the memory is, to choose devices by: 'numa:1', 'pci:0000:3b:00.0' (a "
                    "GPU), or empty if it is not known.")
      .def_readonly("traffic_class", &EngineConfig::traffic_class,
                    "Traffic class of RoCE packets; their DSCP is its upper six bits.")
      .def_readonly("service_level", &EngineConfig::service_level,
                    "InfiniBand service level, or RoCE priority.")
      .def_readonly("block_size", &EngineConfig::block_size,
                    "Bytes, 4 KiB to 8 MiB: longer runs are sliced into blocks of this size.")
      .def_readonly("queue_depth", &EngineConfig::queue_depth,
                    "Slices per peer that may be posted and not yet acknowledged; further ones "
                    "wait inside the engine.")
      .def_readonly("qps_per_peer", &EngineConfig::qps_per_peer, "Data connections to each peer.")
      .def_readonly("peer_timeout_s", &EngineConfig::peer_timeout_s,
                    "Seconds of silence after which a peer is lost; a heartbeat goes out every "
                    "fifth of it.")
      .def_readonly("connect_timeout_s", &EngineConfig::connect_timeout_s,
                    "Seconds from connect() until both sides must be ready.")
      .def_readonly("spin_us", &EngineConfig::spin_us,
                    "Microseconds that the progress thread polls after activity before it blocks; "
                    "-1: the backend's own choice.")
      .def_readonly("progress_cpu", &EngineConfig::progress_cpu,
                    "CPU that the progress thread is pinned to; -1: any near the device.")
      .def_readonly("link", &EngineConfig::link,
                    "An emulated link to each peer, such as '25GB/s' or '12.5GB/s+5us' (rate and "
                    "latency), for measurements: completions and signals wait until it would have "
                    "carried the bytes. Empty: the hardware as it is.");
}

std::string event_repr(const Event& event) {
  std::ostringstream text;
  text << "<Event " << py::str(py::cast(event.kind).attr("name")).cast<std::string>()
       << " peer=" << event.peer << " id=" << event.id << " imm=" << event.imm << " data=<"
       << event.data.size() << " bytes> reason='" << event.reason << "'>";
  return text.str();
}

void register_events(py::module_& module) {
  py::enum_<EventKind>(module, "EventKind", "What an Event reports.")
      .value("CONNECTED", EventKind::kConnected)
      .value("TRANSFER_DONE", EventKind::kTransferDone)
      .value("TRANSFER_FAILED", EventKind::kTransferFailed)
      .value("IMM", EventKind::kImm)
      .value("MESSAGE", EventKind::kMessage)
      .value("PEER_LOST", EventKind::kPeerLost);
  py::class_<Event>(module, "Event",
                    "One thing that happened. Fields that the kind does not use are 0 or empty.\n\n"
                    "CONNECTED: writes to the peer can land, and its own.\n"
                    "TRANSFER_DONE: the bytes of write `id` are in the peer's memory.\n"
                    "TRANSFER_FAILED: write `id` will not complete, for `reason`; any part of it "
                    "may have landed.\n"
                    "IMM: the peer's signal `imm`; all its earlier writes have landed here.\n"
                    "MESSAGE: the peer's send() of `data`.\n"
                    "PEER_LOST: fenced for `reason`; the last event of this peer.")
      .def_readonly("kind", &Event::kind)
      .def_readonly("peer", &Event::peer)
      .def_readonly("time_ns", &Event::time_ns, "When the engine saw it, as time.monotonic_ns().")
      .def_readonly("posted_ns", &Event::posted_ns,
                    "TRANSFER_DONE: when its last slice was posted, as time.monotonic_ns().")
      .def_readonly("id", &Event::id)
      .def_readonly("imm", &Event::imm)
      .def_property_readonly("data", [](const Event& event) { return py::bytes(event.data); })
      .def_readonly("reason", &Event::reason)
      .def("__repr__", &event_repr);
}

}  // namespace

void register_types(py::module_& module) {
  register_config(module);
  register_events(module);
  py::class_<BackendInfo>(module, "BackendInfo", "Whether a backend can be used on this host.")
      .def_readonly("name", &BackendInfo::name)
      .def_readonly("usable", &BackendInfo::usable)
      .def_readonly("reason", &BackendInfo::reason, "What it uses, or what is missing.")
      .def("__repr__", [](const BackendInfo& info) {
        return "<BackendInfo " + info.name + (info.usable ? " usable: " : " not usable: ") +
               info.reason + ">";
      });
}

}  // namespace rkv::python
