// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/config.h"
#include "core/control_link.h"
#include "core/endpoint_descriptor.h"
#include "core/transfer_queue.h"

namespace rkv {

/// What the progress thread knows of one peer.
struct Connection {
  enum class State : std::uint8_t {
    kEndpoint,    ///< create_endpoint() done, connect() not yet called.
    kConnecting,  ///< Sockets are being opened, or the peer is not ready.
    kConnected,
    kLost,  ///< Fenced; only PEER_LOST and close_peer() remain.
  };

  Connection(PeerId peer, std::string name, const Token& own_token, std::size_t queue_depth,
             const Marks& marks)
      : id(peer), label(std::move(name)), token(own_token), queue(peer, queue_depth, marks) {}

  PeerId id;
  std::string label;
  Token token;
  TransferQueue queue;
  State state = State::kEndpoint;

  Bytes remote_blob = {};
  std::vector<RemoteMemory> remote_memory = {};
  std::vector<UniqueFd> sockets = {};  ///< By lane; control first. Empty once handed over.
  std::unique_ptr<ControlLink> link = nullptr;
  std::vector<Bytes> early_messages = {};  ///< Sent before there was a link.
  Clock::time_point connect_deadline = {};
  Clock::time_point next_heartbeat = {};

  std::string lost_reason = {};
  bool lost_reported = false;

  std::uint64_t bytes_submitted = 0;
  std::uint64_t transfers_done = 0;
  std::uint64_t transfers_failed = 0;
  std::uint64_t imms_received = 0;
  std::uint64_t messages_received = 0;

  [[nodiscard]] bool has_all_sockets() const {
    return std::all_of(sockets.begin(), sockets.end(), [](const UniqueFd& fd) { return bool{fd}; });
  }
};

}  // namespace rkv
