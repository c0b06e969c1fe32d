// SPDX-License-Identifier: Apache-2.0
/// Peers' lives: endpoint, connect, liveness, loss, close.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "core/progress.h"
#include "core/text.h"

namespace rkv {
namespace {

std::string seconds_text(double seconds) { return number_text(seconds) + " s"; }

}  // namespace

Connection& Progress::get(PeerId peer) const { return *connections_.at(peer); }

Bytes Progress::create_endpoint(PeerId peer, const std::string& label, const Token& token) {
  Bytes blob = backend_->create_endpoint(peer);
  connections_[peer] = std::make_unique<Connection>(
      peer, label, token, backend_->window(static_cast<std::size_t>(config_.queue_depth)), marks_);
  acceptor_.add_endpoint(token, peer);
  return blob;
}

void Progress::connect(PeerId peer, const EndpointDescriptor& remote,
                       std::vector<RemoteMemory> memory) {
  Connection& connection = get(peer);
  connection.state = Connection::State::kConnecting;
  connection.connect_deadline = Clock::now() + config_.connect_timeout();
  connection.remote_blob = remote.blob;
  connection.remote_memory = std::move(memory);
  const std::uint8_t lanes = std::min(remote.lanes, backend_->lanes());
  connection.sockets.resize(std::size_t{lanes} + 1);
  const EndpointDescriptor own{.incarnation = incarnation_, .token = connection.token};
  if (!own.dials(remote)) {
    acceptor_.expect(connection.token, remote, lanes);
    return;
  }
  try {
    for (std::uint8_t lane = kControlLane; lane <= lanes; ++lane) {
      dialer_.dial(peer, remote,
                   {.lane = lane,
                    .lanes = lanes,
                    .acceptor = remote.token,
                    .dialer = connection.token,
                    .dialer_incarnation = incarnation_});
    }
  } catch (const std::runtime_error& error) {
    lose(connection, error.what());
  }
}

void Progress::on_socket(PeerId peer, std::uint8_t lane, UniqueFd fd) {
  Connection& connection = get(peer);
  if (connection.state != Connection::State::kConnecting) return;
  connection.sockets[lane] = std::move(fd);
  if (connection.has_all_sockets()) establish(connection);
}

void Progress::establish(Connection& connection) {
  try {
    std::vector<UniqueFd> sockets = std::move(connection.sockets);
    connection.sockets.clear();
    for (const UniqueFd& fd : sockets) {
      set_liveness_options(
          fd.get(), std::chrono::duration_cast<std::chrono::milliseconds>(config_.peer_timeout()));
    }
    connection.link = std::make_unique<ControlLink>(
        loop_, std::move(sockets.front()),
        ControlLink::Callbacks{
            .on_ready = [this, &connection] { on_ready(connection); },
            .on_message =
                [this, &connection](Bytes data) {
                  ++counters_.messages_received;
                  ++connection.messages_received;
                  events_.push({.kind = EventKind::kMessage,
                                .peer = connection.id,
                                .data = std::move(data)});
                },
            .on_lost = [this,
                        &connection](const std::string& reason) { lose(connection, reason); }});
    sockets.erase(sockets.begin());
    backend_->connect(connection.id, {.blob = std::move(connection.remote_blob),
                                      .memory = std::move(connection.remote_memory),
                                      .sockets = std::move(sockets)});
    connection.link->send(ControlLink::Type::kReady);
    for (const Bytes& message : std::exchange(connection.early_messages, {})) {
      connection.link->send(ControlLink::Type::kMessage, message);
    }
  } catch (const std::exception& error) {
    lose(connection, error.what());
  }
}

/// Both ends can receive now; what is left to know is whether packets find their way.
void Progress::on_ready(Connection& connection) {
  if (connection.state == Connection::State::kConnecting) backend_->probe(connection.id);
}

void Progress::mark_connected(Connection& connection) {
  if (connection.state != Connection::State::kConnecting) return;
  connection.state = Connection::State::kConnected;
  connection.next_heartbeat = Clock::now();
  events_.push({.kind = EventKind::kConnected, .peer = connection.id});
}

void Progress::send(PeerId peer, Bytes message) {
  Connection& connection = get(peer);
  if (connection.state == Connection::State::kLost) return;
  ++counters_.messages_sent;
  if (connection.link) {
    connection.link->send(ControlLink::Type::kMessage, message);
  } else {
    connection.early_messages.push_back(std::move(message));
  }
}

std::chrono::milliseconds Progress::until_tick(Clock::time_point now) const {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(next_tick_ - now);
  return std::max(left, std::chrono::milliseconds(0));
}

void Progress::tick(Clock::time_point now) {
  if (now < next_tick_) return;
  next_tick_ = now + tick_interval_;
  acceptor_.expire(now);
  for (auto& [id, connection] : connections_) check_liveness(*connection, now);
}

void Progress::check_liveness(Connection& connection, Clock::time_point now) {
  if (connection.state == Connection::State::kConnecting && now >= connection.connect_deadline) {
    lose(connection, "not connected after " + seconds_text(config_.connect_timeout_s) +
                         " (connect_timeout_s); did the peer call connect() too?");
  }
  if (connection.state != Connection::State::kConnected) return;
  if (now - connection.link->last_heard() > config_.peer_timeout()) {
    lose(connection, "no heartbeat for " + seconds_text(config_.peer_timeout_s) +
                         " (peer_timeout_s); its process is stopped or its node unreachable");
  } else if (now >= connection.next_heartbeat) {
    connection.next_heartbeat = now + config_.heartbeat_interval();
    connection.link->send(ControlLink::Type::kHeartbeat);
    backend_->probe(connection.id);
  }
}

void Progress::lose(Connection& connection, std::string reason) {
  if (connection.state == Connection::State::kLost) return;
  connection.state = Connection::State::kLost;
  if (connection.link) {
    const std::string goodbye = connection.link->find_goodbye();
    if (!goodbye.empty()) reason = goodbye;
  }
  connection.lost_reason = "peer " + connection.label + ": " + reason;
  detach(connection, reason);
  ++counters_.peers_lost;
  on_lost_(connection.id, connection.lost_reason);
  // Writes accepted before on_lost_ are commands already queued; they must fail first.
  loop_.post([this, id = connection.id] {
    if (connections_.contains(id)) report_lost(get(id));
  });
}

void Progress::report_lost(Connection& connection) {
  if (std::exchange(connection.lost_reported, true)) return;
  fail_outstanding(connection, connection.lost_reason);
  connection.link.reset();
  events_.push(
      {.kind = EventKind::kPeerLost, .peer = connection.id, .reason = connection.lost_reason});
}

/// The fence: afterwards nothing of the peer can land and nothing of it is sent.
void Progress::detach(Connection& connection, const std::string& goodbye) {
  if (connection.link) connection.link->say_goodbye(goodbye);
  backend_->close_peer(connection.id);
  dialer_.cancel(connection.id);
  acceptor_.remove_endpoint(connection.token);
  connection.sockets.clear();
}

void Progress::fail_outstanding(Connection& connection, const std::string& reason) {
  for (const TransferId id : connection.queue.abandon()) {
    fail_transfer(connection, id, reason);
  }
}

void Progress::close_peer(PeerId peer, const std::string& why) {
  Connection& connection = get(peer);
  if (connection.state == Connection::State::kLost) {
    report_lost(connection);
  } else {
    detach(connection, why);
    fail_outstanding(connection, "peer " + connection.label + ": " + why);
  }
  connections_.erase(peer);
}

Path Progress::peer_path(PeerId peer) const {
  const Connection& connection = get(peer);
  if (connection.state != Connection::State::kConnected) {
    throw std::runtime_error("peer_path(): peer " + connection.label + " is not connected");
  }
  return backend_->path(peer);
}

Stats Progress::peer_stats(PeerId peer) const {
  const Connection& connection = get(peer);
  Stats stats;
  stats["connected"] = std::uint64_t{connection.state == Connection::State::kConnected};
  stats["slices_in_flight"] = std::uint64_t{connection.queue.in_flight()};
  stats["slices_posted"] = connection.queue.slices_posted();
  stats["transfers_outstanding"] = std::uint64_t{connection.queue.outstanding()};
  stats["transfers_done"] = connection.transfers_done;
  stats["transfers_failed"] = connection.transfers_failed;
  stats["bytes_submitted"] = connection.bytes_submitted;
  stats["imms_received"] = connection.imms_received;
  stats["messages_received"] = connection.messages_received;
  return stats;
}

}  // namespace rkv
