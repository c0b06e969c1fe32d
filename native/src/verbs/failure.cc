// SPDX-License-Identifier: Apache-2.0
#include "verbs/failure.h"

#include <sstream>

namespace rkv::verbs {

std::string_view name_of(Chain::Kind kind) {
  switch (kind) {
    case Chain::Kind::kWrites:
      return "WRITE";
    case Chain::Kind::kSignal:
      return "signal";
    case Chain::Kind::kProbe:
      return "keep-alive (empty WRITE)";
  }
  return "WR";
}

std::string_view likely_cause(ibv_wc_status status) {
  switch (status) {
    case IBV_WC_RETRY_EXC_ERR:
      return "the peer's QP or node is gone, or packets do not reach it: compare GIDs and MTU of "
             "both ports, look for a firewall on UDP port 4791 (RoCE v2) and for a port that is "
             "down";
    case IBV_WC_RNR_RETRY_EXC_ERR:
      return "the peer had no receive posted: its progress thread does not run";
    case IBV_WC_REM_ACCESS_ERR:
      return "the peer refused the address or rkey: its memory was deregistered, or the "
             "descriptor is of an earlier incarnation";
    case IBV_WC_REM_INV_REQ_ERR:
      return "the peer's NIC found the request invalid; acknowledgements that come too late cause "
             "this too: raise peer_timeout_s";
    case IBV_WC_REM_OP_ERR:
      return "the peer's NIC failed to do it: see the peer's kernel log";
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_QP_OP_ERR:
      return "this side's lkey or address is not valid: source memory was deregistered";
    case IBV_WC_LOC_LEN_ERR:
      return "a message exceeds what the port takes: lower block_size";
    case IBV_WC_LOC_ACCESS_ERR:
      return "a receive could not be placed: this engine posts none with memory, so the peer "
             "speaks another protocol";
    case IBV_WC_WR_FLUSH_ERR:
      return "the QP had failed before";
    case IBV_WC_FATAL_ERR:
    case IBV_WC_GENERAL_ERR:
      return "the NIC or its driver failed: see the kernel log";
    default:
      return "see the kernel log";
  }
}

std::string completion_error(const ibv_wc& wc, std::string_view what,
                             std::string_view status_text) {
  std::ostringstream text;
  text << what << " failed with '" << status_text << "' (status " << wc.status
       << ", vendor error 0x" << std::hex << wc.vendor_err << "): " << likely_cause(wc.status);
  return text.str();
}

}  // namespace rkv::verbs
