// SPDX-License-Identifier: Apache-2.0
#include "backends/routed_backend.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "core/error.h"
#include "core/wire.h"

namespace rkv {
namespace {

/// What each member pinned, by its place; null where it pins nothing or could not.
struct PinnedByAll final : PinnedMemory {
  std::vector<std::unique_ptr<PinnedMemory>> parts;
};

/// In the place of what a member could not pin.
struct Refused final : PinnedMemory {
  explicit Refused(std::string why) : reason(std::move(why)) {}
  std::string reason;
};

/// Blobs by backend.
using Blobs = std::map<std::string, Bytes, std::less<>>;

Bytes encode(const Blobs& blobs) {
  ByteWriter writer;
  for (const auto& [name, blob] : blobs) {
    writer.put_string(name);
    writer.put(static_cast<std::uint32_t>(blob.size()));
    writer.put_bytes(blob);
  }
  return writer.take();
}

Blobs decode(std::string_view bytes) {
  Blobs blobs;
  for (std::size_t used = 0; used < bytes.size();) {
    ByteReader reader(bytes.substr(used));
    const std::string name = reader.get_string("backend");
    const auto length = reader.get<std::uint32_t>("length");
    blobs[name] = reader.get_bytes(length, "blob");
    used += 2 + name.size() + sizeof length + length;
  }
  return blobs;
}

}  // namespace

std::uint8_t RoutedBackend::lanes() const {
  std::uint8_t lanes = 0;
  for (const Member& member : members_) {
    if (member.backend) lanes = static_cast<std::uint8_t>(lanes + member.backend->lanes());
  }
  return lanes;
}

std::size_t RoutedBackend::window(std::size_t queue_depth) const {
  std::size_t window = queue_depth;
  for (const Member& member : members_) {
    if (member.backend) window = std::max(window, member.backend->window(queue_depth));
  }
  return window;
}

void RoutedBackend::attach(EventLoop& loop) {
  for (const Member& member : members_) {
    if (member.backend) member.backend->attach(loop);
  }
}

std::string RoutedBackend::describe() const {
  std::string text;
  for (const Member& member : members_) {
    text += (text.empty() ? "" : "\n") + member.name + ": " +
            (member.missing.empty() ? member.backend->describe() : "not used: " + member.missing);
  }
  return text;
}

std::vector<std::size_t> RoutedBackend::cpus() const {
  for (const Member& member : members_) {
    if (member.backend && !member.backend->cpus().empty()) return member.backend->cpus();
  }
  return {};
}

bool RoutedBackend::polls() const {
  return std::any_of(members_.begin(), members_.end(), [](const Member& member) {
    return member.backend && member.backend->polls();
  });
}

std::chrono::microseconds RoutedBackend::default_spin() const {
  std::chrono::microseconds spin{};
  for (const Member& member : members_) {
    if (member.backend) spin = std::max(spin, member.backend->default_spin());
  }
  return spin;
}

std::uint64_t RoutedBackend::small_write() const {
  std::uint64_t nbytes = UINT64_MAX;
  for (const Member& member : members_) {
    if (member.backend) nbytes = std::min(nbytes, member.backend->small_write());
  }
  return nbytes;
}

std::unique_ptr<PinnedMemory> RoutedBackend::pin_memory(const MemoryRange& range,
                                                        const MemoryUse& use) {
  auto pinned = std::make_unique<PinnedByAll>();
  std::string refusals;
  bool any = false;
  for (Member& member : members_) {
    auto& part = pinned->parts.emplace_back();
    if (!member.missing.empty()) continue;
    try {
      part = member.backend->pin_memory(range, use);
      any = true;
    } catch (const std::exception& error) {
      // Kept for register_memory(), which runs in a turn; this may run beside others.
      refusals += (refusals.empty() ? "" : "; ") + std::string(error.what());
      part = std::make_unique<Refused>(error.what());
    }
  }
  if (!any) throw std::runtime_error(refusals);
  return pinned;
}

Bytes RoutedBackend::register_memory(RegionId region, MemoryRange range, MemoryUse use,
                                     std::unique_ptr<PinnedMemory> pinned) {
  auto& all = dynamic_cast<PinnedByAll&>(*pinned);
  Blobs blobs;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    Member& member = members_[i];
    if (!member.missing.empty()) continue;
    if (const auto* refused = dynamic_cast<const Refused*>(all.parts[i].get())) {
      member.missing = refused->reason;
      continue;
    }
    blobs[member.name] =
        member.backend->register_memory(region, range, use, std::move(all.parts[i]));
  }
  return use.peer_writable ? encode(blobs) : Bytes();
}

std::unique_ptr<PinnedMemory> RoutedBackend::deregister_memory(RegionId region) {
  auto pinned = std::make_unique<PinnedByAll>();
  for (const Member& member : members_) {
    if (member.backend) pinned->parts.push_back(member.backend->deregister_memory(region));
  }
  return pinned;
}

Bytes RoutedBackend::create_endpoint(PeerId peer) {
  peers_[peer] = {};
  Blobs blobs;
  for (const Member& member : members_) {
    if (member.missing.empty()) blobs[member.name] = member.backend->create_endpoint(peer);
  }
  return encode(blobs);
}

void RoutedBackend::connect(PeerId id, PeerLink link) {
  Peer& peer = peers_.at(id);
  const Blobs offered = decode(link.blob);
  std::vector<Blobs> regions;
  for (const RemoteMemory& memory : link.memory) regions.push_back(decode(memory.blob));
  std::string refusals;
  auto socket = link.sockets.begin();
  for (const Member& member : members_) {
    const auto blob = offered.find(member.name);
    const bool everywhere = std::all_of(regions.begin(), regions.end(),
                                        [&](const Blobs& at) { return at.contains(member.name); });
    if (!member.missing.empty() || blob == offered.end() || !everywhere) {
      if (member.has_hardware) {
        refusals += member.name + ": " +
                    (member.missing.empty() ? "the peer cannot use it" : member.missing) + "; ";
      }
      continue;
    }
    if (!member.backend->accepts(blob->second)) continue;
    PeerLink own{.blob = blob->second, .memory = {}, .sockets = {}};
    for (std::size_t i = 0; i < regions.size(); ++i) {
      own.memory.push_back({link.memory[i].range, regions[i].at(member.name)});
    }
    const auto lanes =
        std::min<std::ptrdiff_t>(member.backend->lanes(), link.sockets.end() - socket);
    own.sockets.assign(std::make_move_iterator(socket), std::make_move_iterator(socket + lanes));
    socket += lanes;
    member.backend->connect(id, std::move(own));
    peer.connected.push_back(member.backend.get());
    const Path path = member.backend->path(id);
    if (peer.writer == nullptr && path.writes) {
      peer.writer = member.backend.get();
      peer.path = path;
    } else if (peer.writer == nullptr) {
      refusals += member.name + ": " + path.description + "; ";
    }
  }
  if (peer.connected.empty() || peer.writer == nullptr) {
    throw std::runtime_error("no backend reaches this peer: " + refusals);
  }
  // What is slower than the best is fine where nothing better is there.
  if (peer.writer != members_.front().backend.get() && !refusals.empty()) {
    refusals.resize(refusals.size() - 2);
    peer.path.warning = std::string(peer.writer->name()) + " is used because of " + refusals;
  }
}

void RoutedBackend::probe(PeerId id) {
  for (Backend* backend : peers_.at(id).connected) backend->probe(id);
}

Path RoutedBackend::path(PeerId id) const { return peers_.at(id).path; }

Posted RoutedBackend::post_writes(PeerId id, TransferId transfer,
                                  std::span<const WriteSlice> slices,
                                  std::optional<std::uint32_t> imm) {
  return peers_.at(id).writer->post_writes(id, transfer, slices, imm);
}

bool RoutedBackend::post_signal(PeerId id, std::uint32_t imm) {
  return peers_.at(id).writer->post_signal(id, imm);
}

void RoutedBackend::close_peer(PeerId id) {
  for (const Member& member : members_) {
    if (member.backend) member.backend->close_peer(id);
  }
  peers_.erase(id);
}

bool RoutedBackend::progress(std::vector<Completion>& completions) {
  const std::size_t before = completions.size();
  bool moved = false;
  for (const Member& member : members_) {
    if (member.backend) moved = member.backend->progress(completions) || moved;
  }
  // A peer is reachable when it is by every way.
  const auto begin = completions.begin() + static_cast<std::ptrdiff_t>(before);
  completions.erase(std::remove_if(begin, completions.end(),
                                   [this](const Completion& completion) {
                                     if (completion.kind != Completion::Kind::kReachable) {
                                       return false;
                                     }
                                     Peer& peer = peers_.at(completion.peer);
                                     return ++peer.reachable < peer.connected.size();
                                   }),
                    completions.end());
  return moved;
}

bool RoutedBackend::arm() {
  bool armed = true;
  for (const Member& member : members_) {
    if (member.backend) armed = member.backend->arm() && armed;
  }
  return armed;
}

void RoutedBackend::add_stats(Stats& stats) const {
  for (const Member& member : members_) {
    if (member.backend) member.backend->add_stats(stats);
  }
}

}  // namespace rkv
