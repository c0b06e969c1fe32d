// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// build_uml.sh puts this into arch/um/kernel/trap.c, in the place of flush_tlb_page().
//
// A page fault takes three switches between the kernel and the process that it traces: 167 us, where
// a switch takes 50, and it maps one page on the host. So map the neighbours that are there too (the
// generic code brings in 16 pages of a file at once), and give anonymous memory its next pages with
// the first: 22 us a page. Neighbours are contiguous in memory and make one mapping of the host,
// whose vm.max_map_count (65,530 on Debian 12) one `import vllm` otherwise exceeds.

#include <linux/mm.h>
#include <linux/minmax.h>
#include <asm/tlbflush.h>

#define MAP_AROUND_BYTES (16 * PAGE_SIZE)

static void map_around(struct vm_area_struct *vma, unsigned long address, int is_write) {
  unsigned long window = address & ~(MAP_AROUND_BYTES - 1);
  unsigned long start = max(window, vma->vm_start);
  unsigned long end = min(window + MAP_AROUND_BYTES, vma->vm_end);
  unsigned long next;

  if (is_write && vma_is_anonymous(vma)) {
    for (next = (address & PAGE_MASK) + PAGE_SIZE; next < end; next += PAGE_SIZE) {
      if (handle_mm_fault(vma, next, FAULT_FLAG_WRITE, NULL) & VM_FAULT_ERROR) break;
    }
  }
  flush_tlb_range(vma, start, end);
}
