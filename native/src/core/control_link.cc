// SPDX-License-Identifier: Apache-2.0
#include "core/control_link.h"

#include <sys/epoll.h>

#include <utility>

#include "core/socket.h"
#include "core/wire.h"

namespace rkv {
namespace {

constexpr std::size_t kHeaderBytes = 8;  // u32 body length, u8 type, 3 bytes zero
constexpr std::size_t kReceiveBytes = 64 << 10;
/// Per turn, so that a peer that floods us with messages does not starve the others.
constexpr int kReceivesPerTurn = 16;

Bytes encode(ControlLink::Type type, std::string_view body) {
  ByteWriter writer;
  writer.put(static_cast<std::uint32_t>(body.size()));
  writer.put(static_cast<std::uint8_t>(type));
  writer.put_bytes({"\0\0\0", 3});
  writer.put_bytes(body);
  return writer.take();
}

}  // namespace

ControlLink::ControlLink(EventLoop& loop, UniqueFd fd, Callbacks callbacks)
    : loop_(loop), fd_(std::move(fd)), callbacks_(std::move(callbacks)), watched_(EPOLLIN) {
  loop_.watch(fd_.get(), watched_, [this](std::uint32_t events) { on_ready(events); });
}

ControlLink::~ControlLink() { close(); }

void ControlLink::on_ready(std::uint32_t epoll_events) {
  if ((epoll_events & ~std::uint32_t{EPOLLOUT}) != 0) receive();
  if (fd_ && (epoll_events & EPOLLOUT) != 0) flush();
}

void ControlLink::receive() {
  for (int turn = 0; turn < kReceivesPerTurn && fd_; ++turn) {
    const std::size_t have = received_.size();
    received_.resize(have + kReceiveBytes);
    const IoResult got = receive_some(fd_.get(), received_.data() + have, kReceiveBytes);
    received_.resize(have + got.nbytes);
    if (got.status == IoStatus::kWouldBlock) return;
    if (got.status == IoStatus::kClosed) {
      lose("control connection: " + got.reason("recv"));
      return;
    }
    last_heard_ = Clock::now();
    parse();
    if (got.nbytes < kReceiveBytes) return;
  }
}

void ControlLink::parse() {
  std::size_t parsed = 0;
  while (fd_ && received_.size() - parsed >= kHeaderBytes) {
    ByteReader header(std::string_view(received_).substr(parsed, kHeaderBytes));
    const auto length = header.get<std::uint32_t>("length");
    const auto type = static_cast<Type>(header.get<std::uint8_t>("type"));
    if (length > kMaxMessageBytes) {
      lose("control connection: a frame of " + std::to_string(length) + " bytes");
      return;
    }
    if (received_.size() - parsed - kHeaderBytes < length) break;
    const Bytes body = received_.substr(parsed + kHeaderBytes, length);
    parsed += kHeaderBytes + length;
    handle(type, body);
  }
  received_.erase(0, parsed);
}

void ControlLink::handle(Type type, std::string_view body) {
  switch (type) {
    case Type::kReady:
      callbacks_.on_ready();
      return;
    case Type::kHeartbeat:
      return;
    case Type::kMessage:
      callbacks_.on_message(Bytes(body));
      return;
    case Type::kGoodbye:
      goodbye_ = "the peer closed the connection: " + std::string(body);
      lose(goodbye_);
      return;
  }
  lose("control connection: a frame of unknown type " +
       std::to_string(static_cast<unsigned>(type)));
}

void ControlLink::send(Type type, std::string_view body) {
  if (!fd_) return;
  unsent_.push_back(encode(type, body));
  flush();
}

void ControlLink::flush() {
  while (!unsent_.empty()) {
    const Bytes& front = unsent_.front();
    const IoResult sent =
        send_some(fd_.get(), front.data() + front_sent_, front.size() - front_sent_);
    if (sent.status == IoStatus::kClosed) {
      // The peer's last words may still be in our receive buffer; receive() reads them and then
      // finds the end. Asking for EPOLLOUT again would spin.
      unsent_.clear();
      front_sent_ = 0;
      break;
    }
    front_sent_ += sent.nbytes;
    if (front_sent_ < front.size()) break;
    unsent_.pop_front();
    front_sent_ = 0;
  }
  watch_for(unsent_.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

void ControlLink::watch_for(std::uint32_t epoll_events) {
  if (std::exchange(watched_, epoll_events) != epoll_events) {
    loop_.change(fd_.get(), epoll_events);
  }
}

void ControlLink::say_goodbye(std::string_view reason) {
  if (!fd_) return;
  callbacks_.on_lost = [](const std::string&) {};
  send(Type::kGoodbye, reason);
  close();
}

std::string ControlLink::find_goodbye() {
  if (fd_) receive();
  return goodbye_;
}

void ControlLink::lose(std::string reason) {
  close();
  callbacks_.on_lost(std::move(reason));
}

void ControlLink::close() {
  if (!fd_) return;
  loop_.unwatch(fd_.get());
  fd_.reset();
}

}  // namespace rkv
