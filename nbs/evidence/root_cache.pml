/* The cache of roots of Linux 6.1: 2 vCPUs, L2 of 4-level and PAE, 2 pointers.
   Made by kvm_mmu_lit.evidence.cache_model, which says what the numbers mean.
   SPDX-License-Identifier: Apache-2.0 */
#define SHARED 4
typedef Vcpu { unsigned asks : 3 = 1; unsigned l1 : 2; unsigned pdptrs : 2; unsigned zap : 1; unsigned fresh : 1; unsigned root : 3; unsigned p0 : 3; unsigned p1 : 3; unsigned p2 : 3 };
Vcpu v[2];

/* KVM lets the guest run: obsolete roots go, all at once, and a missing root is built. */
inline enter(i) {
  v[i].fresh = 0;
  if
  :: v[i].zap -> v[i].root = 0; v[i].p0 = 0; v[i].p1 = 0; v[i].p2 = 0; v[i].zap = 0
  :: else
  fi;
  if
  :: v[i].root == 0 -> v[i].root = v[i].asks
  :: else
  fi;
  assert(v[i].root == v[i].asks)
}

/* fast_pgd_switch(): roots above SHARED are the vCPU's own and never stay. */
inline switch_to(i, to) {
  v[i].asks = to;
  if
  :: v[i].root > SHARED -> v[i].root = 0
  :: else
  fi;
  if
  :: v[i].root != 0 ->
     if
     :: v[i].root == to && !v[i].zap
     :: else ->
        if
        :: v[i].p0 == to && !v[i].zap -> v[i].p0 = v[i].root; v[i].root = to
        :: else ->
           if
           :: v[i].p1 == to && !v[i].zap -> v[i].p1 = v[i].p0; v[i].p0 = v[i].root; v[i].root = to
           :: else ->
              if
              :: v[i].p2 == to && !v[i].zap -> v[i].p2 = v[i].p1; v[i].p1 = v[i].p0; v[i].p0 = v[i].root; v[i].root = to
              :: else -> v[i].p2 = v[i].p1; v[i].p1 = v[i].p0; v[i].p0 = v[i].root; v[i].root = 0
              fi
           fi
        fi
     fi
  :: else ->
     if
     :: v[i].zap
     :: else ->
        if
        :: v[i].p0 == to -> v[i].root = to; v[i].p0 = v[i].p1; v[i].p1 = v[i].p2; v[i].p2 = 0
        :: v[i].p1 == to -> v[i].root = to; v[i].p1 = v[i].p2; v[i].p2 = 0
        :: v[i].p2 == to -> v[i].root = to; v[i].p2 = 0
        :: else
        fi
     fi
  fi
}

/* load_pdptrs(): other PDPTEs cost the current root. */
inline load_pdptrs(i, ptr) {
  if
  :: v[i].pdptrs != ptr -> v[i].root = 0; v[i].pdptrs = ptr
  :: else
  fi
}

inline leave(i) {
  switch_to(i, v[i].l1);
  v[i].l1 = 0
}

init {
  do
  :: d_step { v[0].l1 == 0 -> enter(0); if :: v[0].asks != 1 -> switch_to(0, 1) :: else fi }   /* 0: cr3 A */
  :: d_step { v[0].l1 == 0 -> enter(0); if :: v[0].asks != 2 -> switch_to(0, 2) :: else fi }   /* 0: cr3 B */
  :: d_step { v[0].l1 == 0 -> enter(0); v[0].l1 = v[0].asks; switch_to(0, 3); v[0].fresh = 1 }   /* 0: vmrun 4-level X */
  :: d_step { v[0].l1 == 0 -> enter(0); v[0].l1 = v[0].asks; switch_to(0, 4); v[0].fresh = 1 }   /* 0: vmrun 4-level Y */
  :: d_step { v[0].l1 == 0 -> enter(0); v[0].l1 = v[0].asks; load_pdptrs(0, 1); switch_to(0, 5); v[0].fresh = 1 }   /* 0: vmrun PAE X */
  :: d_step { v[0].l1 == 0 -> enter(0); v[0].l1 = v[0].asks; load_pdptrs(0, 2); switch_to(0, 6); v[0].fresh = 1 }   /* 0: vmrun PAE Y */
  :: d_step { v[0].l1 != 0 -> enter(0); leave(0) }   /* 0: vmexit */
  :: d_step { v[0].l1 != 0 -> leave(0) }   /* 0: interrupt */
  :: d_step { v[0].l1 != 0 -> enter(0); if :: v[0].asks <= SHARED && v[0].asks != 3 -> switch_to(0, 3) :: v[0].asks > SHARED && v[0].asks != 5 -> load_pdptrs(0, 1); switch_to(0, 5) :: else fi }   /* 0: cr3 X */
  :: d_step { v[0].l1 != 0 -> enter(0); if :: v[0].asks <= SHARED && v[0].asks != 4 -> switch_to(0, 4) :: v[0].asks > SHARED && v[0].asks != 6 -> load_pdptrs(0, 2); switch_to(0, 6) :: else fi }   /* 0: cr3 Y */
  :: d_step { v[1].l1 == 0 -> enter(1); if :: v[1].asks != 1 -> switch_to(1, 1) :: else fi }   /* 1: cr3 A */
  :: d_step { v[1].l1 == 0 -> enter(1); if :: v[1].asks != 2 -> switch_to(1, 2) :: else fi }   /* 1: cr3 B */
  :: d_step { v[1].l1 == 0 -> enter(1); v[1].l1 = v[1].asks; switch_to(1, 3); v[1].fresh = 1 }   /* 1: vmrun 4-level X */
  :: d_step { v[1].l1 == 0 -> enter(1); v[1].l1 = v[1].asks; switch_to(1, 4); v[1].fresh = 1 }   /* 1: vmrun 4-level Y */
  :: d_step { v[1].l1 == 0 -> enter(1); v[1].l1 = v[1].asks; load_pdptrs(1, 1); switch_to(1, 5); v[1].fresh = 1 }   /* 1: vmrun PAE X */
  :: d_step { v[1].l1 == 0 -> enter(1); v[1].l1 = v[1].asks; load_pdptrs(1, 2); switch_to(1, 6); v[1].fresh = 1 }   /* 1: vmrun PAE Y */
  :: d_step { v[1].l1 != 0 -> enter(1); leave(1) }   /* 1: vmexit */
  :: d_step { v[1].l1 != 0 -> leave(1) }   /* 1: interrupt */
  :: d_step { v[1].l1 != 0 -> enter(1); if :: v[1].asks <= SHARED && v[1].asks != 3 -> switch_to(1, 3) :: v[1].asks > SHARED && v[1].asks != 5 -> load_pdptrs(1, 1); switch_to(1, 5) :: else fi }   /* 1: cr3 X */
  :: d_step { v[1].l1 != 0 -> enter(1); if :: v[1].asks <= SHARED && v[1].asks != 4 -> switch_to(1, 4) :: v[1].asks > SHARED && v[1].asks != 6 -> load_pdptrs(1, 2); switch_to(1, 6) :: else fi }   /* 1: cr3 Y */
  :: d_step { v[0].zap = 1; v[1].zap = 1 }   /* zap */
  od
}
