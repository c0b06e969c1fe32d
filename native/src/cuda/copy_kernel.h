// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace rkv::cuda {

constexpr unsigned kCopyThreads = 256;
constexpr unsigned kPieceBytes = 64 << 10;

/// Copies rows of {u64 from, u64 to, u64 nbytes, u64 gate of the region}: grid x is the row, grid y
/// a piece of kPieceBytes in it.
///
/// PTX, since a build without nvcc shall have it; the driver compiles it for the GPU at hand.
/// Before a block of threads writes it counts itself in at the peer's gate {u32 closed, u32
/// active}, which the peer owns, and then looks whether that or the region's gate is closed.
/// Whoever closes a gate and then sees nobody active knows that nothing can land any more (Dekker's
/// algorithm, hence fence.sc on both sides; see the PTX ISA's memory consistency model).
constexpr const char* kCopyPtx = R"(
.version 7.0
.target sm_70
.address_size 64

.visible .entry rkv_copy(.param .u64 rows, .param .u64 peer_gate, .param .u64 refused)
{
  .reg .pred %is_past, %is_other, %is_open, %is_closed, %is_odd, %is_last;
  .reg .b32 %row, %piece, %thread, %was, %closed, %region_closed, %v<16>;
  .reg .b64 %rows, %skip, %from, %to, %nbytes, %begin, %gate, %region_gate, %refused;
  .reg .b64 %mix, %at, %ahead, %source, %target;
  .reg .b16 %byte;
  .shared .align 16 .b64 shared_row[4];

  mov.u32 %row, %ctaid.x;
  mov.u32 %piece, %ctaid.y;
  mov.u32 %thread, %tid.x;
  mul.wide.u32 %begin, %piece, 65536;
  ld.param.u64 %gate, [peer_gate];
  setp.ne.u32 %is_other, %thread, 0;
  @%is_other bra ENTERED;

  // One thread reads the row, which is in host memory: 256 that do halve the rate. A plain load, since
  // the rows were written before the launch; volatile ones cost a third of it (H100).
  ld.param.u64 %rows, [rows];
  mul.wide.u32 %skip, %row, 32;
  add.u64 %rows, %rows, %skip;
  ld.global.v2.u64 {%from, %to}, [%rows];
  ld.global.v2.u64 {%nbytes, %region_gate}, [%rows+16];
  st.shared.v2.u64 [shared_row], {%from, %to};
  setp.ge.u64 %is_past, %begin, %nbytes;
  @%is_past bra PAST;
  atom.relaxed.sys.global.add.u32 %was, [%gate+4], 1;
  fence.sc.sys;
  ld.volatile.global.u32 %closed, [%gate];
  ld.volatile.global.u32 %region_closed, [%region_gate];
  or.b32 %closed, %closed, %region_closed;
  setp.eq.u32 %is_open, %closed, 0;
  @%is_open bra OPEN;
  ld.param.u64 %refused, [refused];
  st.volatile.global.u32 [%refused], 1;
  red.relaxed.sys.global.add.u32 [%gate+4], -1;
PAST:
  mov.u64 %nbytes, 0;
OPEN:
  st.shared.u64 [shared_row+16], %nbytes;
ENTERED:
  bar.sync 0;
  ld.shared.v2.u64 {%from, %to}, [shared_row];
  ld.shared.u64 %nbytes, [shared_row+16];
  setp.eq.u64 %is_closed, %nbytes, 0;
  @%is_closed bra END;

  or.b64 %mix, %from, %to;
  or.b64 %mix, %mix, %nbytes;
  and.b64 %mix, %mix, 15;
  setp.ne.u64 %is_odd, %mix, 0;
  add.u64 %from, %from, %begin;
  add.u64 %to, %to, %begin;
  sub.u64 %nbytes, %nbytes, %begin;
  min.u64 %nbytes, %nbytes, 65536;
  @%is_odd bra BYTES;

  mul.wide.u32 %at, %thread, 16;
FOUR:
  add.u64 %ahead, %at, 12288;
  setp.ge.u64 %is_last, %ahead, %nbytes;
  @%is_last bra ONE;
  add.u64 %source, %from, %at;
  add.u64 %target, %to, %at;
  ld.global.v4.u32 {%v0, %v1, %v2, %v3}, [%source];
  ld.global.v4.u32 {%v4, %v5, %v6, %v7}, [%source+4096];
  ld.global.v4.u32 {%v8, %v9, %v10, %v11}, [%source+8192];
  ld.global.v4.u32 {%v12, %v13, %v14, %v15}, [%source+12288];
  st.global.v4.u32 [%target], {%v0, %v1, %v2, %v3};
  st.global.v4.u32 [%target+4096], {%v4, %v5, %v6, %v7};
  st.global.v4.u32 [%target+8192], {%v8, %v9, %v10, %v11};
  st.global.v4.u32 [%target+12288], {%v12, %v13, %v14, %v15};
  add.u64 %at, %at, 16384;
  bra FOUR;
ONE:
  setp.ge.u64 %is_last, %at, %nbytes;
  @%is_last bra LEAVE;
  add.u64 %source, %from, %at;
  add.u64 %target, %to, %at;
  ld.global.v4.u32 {%v0, %v1, %v2, %v3}, [%source];
  st.global.v4.u32 [%target], {%v0, %v1, %v2, %v3};
  add.u64 %at, %at, 4096;
  bra ONE;

BYTES:
  cvt.u64.u32 %at, %thread;
NEXT:
  setp.ge.u64 %is_last, %at, %nbytes;
  @%is_last bra LEAVE;
  add.u64 %source, %from, %at;
  add.u64 %target, %to, %at;
  ld.global.u8 %byte, [%source];
  st.global.u8 [%target], %byte;
  add.u64 %at, %at, 256;
  bra NEXT;

LEAVE:
  bar.sync 0;
  @%is_other bra END;
  fence.sc.sys;
  red.relaxed.sys.global.add.u32 [%gate+4], -1;
END:
  ret;
}
)";

}  // namespace rkv::cuda
