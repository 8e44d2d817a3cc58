.code16
.globl _start
_start:
  cli
  xor %ax,%ax
  mov %ax,%ss
  mov $0x7c00,%sp
  mov %cs,%ax
  mov %ax,%ds
  mov $0x1000,%ax
  mov %ax,%es
  xor %di,%di
  xor %eax,%eax
  mov $0x1400,%cx
  cld
  rep stosl
#ifdef LONG
  movl $0x11007,%es:0x0000          # pml4[0]
  movl $0x10003,%es:(0x0000+510*8)  # pml4[510]: recursive
  movl $0x12007,%es:0x1000          # pdpt[0]
  movl $0x00000083,%es:(0x1000+8)   # pdpt[1] 1G page at 0
#else
  movl $0x12001,%es:0x0040          # PDPTE 0, cr3 = 0x10040
  movl $0x12001,%es:0x0048          # PDPTE 1 shares the directory
#endif
  movl $0x13007,%es:0x2000          # pd[0]
  movl $0x00200083,%es:0x2008       # pd[1] 2M
  movl $0x00200000,%es:0x2010       # pd[2] not present, NX
  movl $0x80000000,%es:0x2014
  xor %di,%di
  mov $0x1300,%ax
  mov %ax,%es
  mov $0x3,%eax
  mov $256,%cx
1: mov %eax,%es:(%di)
  add $0x1000,%eax
  add $8,%di
  loop 1b
  movl $0x9001,%es:(300*8)          # read-only, NX
  movl $0x80000000,%es:(300*8+4)
  movl $0x9007,%es:(301*8)
  movl $0xa003,%es:(302*8)
  mov $0xa0,%eax
  mov %eax,%cr4                     # PAE|PGE
#ifdef LONG
  mov $0x10000,%eax
#else
  mov $0x10040,%eax
#endif
  mov %eax,%cr3
  mov $0xc0000080,%ecx
  rdmsr
#ifdef LONG
  or $0x901,%eax
#else
  or $0x800,%eax
#endif
  wrmsr
  lgdtl gdtr
  mov %cr0,%eax
  or $0x80010001,%eax
  mov %eax,%cr0
  ljmpl $8,$(far+0xf0000)
#ifdef LONG
.code64
#else
.code32
#endif
far:
  mov $16,%eax
  mov %eax,%ds
  mov %eax,%ss
  mov $(300*4096),%ebx
  mov (%ebx),%eax
  mov $(302*4096),%ebx
  mov %eax,(%ebx)
  mov $0x40000000,%ebx
  mov (%ebx),%eax
1: hlt
  jmp 1b
.align 8
gdt: .quad 0
#ifdef LONG
 .quad 0x00af9b000000ffff
#else
 .quad 0x00cf9b000000ffff
#endif
 .quad 0x00cf93000000ffff
gdtr: .word 23
 .long gdt+0xf0000
.org 0xfff0
.code16
 ljmp $0xf000,$0
.org 0x10000
