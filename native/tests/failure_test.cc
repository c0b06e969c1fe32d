// SPDX-License-Identifier: Apache-2.0
#include "verbs/failure.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "fake_rdma.h"

namespace rkv::verbs {
namespace {

TEST(Failure, EveryStatusNamesItsLikelyCause) {
  const std::map<ibv_wc_status, std::string> words{
      {IBV_WC_RETRY_EXC_ERR, "firewall on UDP port 4791"},
      {IBV_WC_RNR_RETRY_EXC_ERR, "progress thread"},
      {IBV_WC_REM_ACCESS_ERR, "deregistered"},
      {IBV_WC_REM_INV_REQ_ERR, "raise peer_timeout_s"},
      {IBV_WC_REM_OP_ERR, "the peer's kernel log"},
      {IBV_WC_LOC_PROT_ERR, "source memory was deregistered"},
      {IBV_WC_LOC_QP_OP_ERR, "source memory was deregistered"},
      {IBV_WC_LOC_LEN_ERR, "lower block_size"},
      {IBV_WC_LOC_ACCESS_ERR, "another protocol"},
      {IBV_WC_WR_FLUSH_ERR, "had failed before"},
      {IBV_WC_FATAL_ERR, "NIC or its driver"},
      {IBV_WC_GENERAL_ERR, "NIC or its driver"}};
  for (int status = IBV_WC_LOC_LEN_ERR; status <= IBV_WC_TM_RNDV_INCOMPLETE; ++status) {
    const auto code = static_cast<ibv_wc_status>(status);
    const std::string cause(likely_cause(code));
    const auto word = words.find(code);
    EXPECT_NE(cause.find(word == words.end() ? "kernel log" : word->second), std::string::npos)
        << status << ": " << cause;
  }
}

TEST(Failure, TextHasKindStatusVendorErrorAndCause) {
  ibv_wc wc{};
  wc.status = IBV_WC_RETRY_EXC_ERR;
  wc.vendor_err = 0x81;
  const std::string text = completion_error(wc, name_of(Chain::Kind::kWrites),
                                            FakeFabric::table().wc_status_str(wc.status));
  EXPECT_EQ(text.find("WRITE failed with 'transport retry counter exceeded' (status 12, vendor "
                      "error 0x81): the peer's QP or node is gone"),
            0U)
      << text;
}

TEST(Failure, KindsAreToldApart) {
  const std::set<std::string_view> names{
      name_of(Chain::Kind::kWrites), name_of(Chain::Kind::kSignal), name_of(Chain::Kind::kProbe)};
  EXPECT_EQ(names.size(), 3U);
}

}  // namespace
}  // namespace rkv::verbs
