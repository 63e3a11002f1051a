# The test guest's entries, and its way to ring 3. Assembled with the guest by the tests.
    .section .text.start, "ax"
    .globl _start
    .code64
_start:
    mov $stack_top, %rsp
    mov %rsi, zero_page(%rip)
    # SSE is on: the compiler uses it.
    mov %cr0, %rax
    and $~4, %eax
    or $2, %eax
    mov %rax, %cr0
    mov %cr4, %rax
    or $0x600, %eax
    mov %rax, %cr4
    # All pages are for ring 3, too.
    mov %cr3, %rdi
    orq $4, (%rdi)
    mov $0x1000, %ecx
    lea 0x1000(%rdi), %rdi
1:  testb $1, (%rdi)
    jz 2f
    orb $4, (%rdi)
2:  add $8, %rdi
    sub $1, %ecx
    jnz 1b
    mov %cr3, %rax
    mov %rax, %cr3
    mov %eax, trampoline_tables(%rip)
    # The boot loader's table has no segments for ring 3.
    lgdt gdt_pointer(%rip)
    # Ports are allowed by the task segment's bitmap: a software KVM forgets the level in the flags.
    mov $task, %rax
    mov %ax, task_descriptor+2(%rip)
    shr $16, %rax
    mov %al, task_descriptor+4(%rip)
    mov %ah, task_descriptor+7(%rip)
    mov $0x28, %ax
    ltr %ax
    cmpl $0, stay_in_kernel(%rip)
    jne 3f
    pushq $0x1B            # data, ring 3
    pushq $stack_top - 8   # as after a call
    pushq $0x3002          # port I/O from ring 3, no interrupts
    pushq $0x23            # code, ring 3
    pushq $main
    iretq
3:  call main

# Another CPU, in 64-bit mode, on its way to ring 3: its stack is the one that `start_cpu` has put there.
other_cpu:
    mov $0x10, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    cmpl $1, other_fault(%rip)
    jb 3f
    je 1f
    cmpl $3, other_fault(%rip)
    je 2f
    mov $0x7FFFFFFFF000, %rax   # nothing is there
    jmp *%rax
1:  mov $0xD0000000, %rax       # a device's register, by an instruction that nobody emulates
    fldl (%rax)
2:  mov $0x7F000000, %rax       # page tables where there is no memory
    mov %rax, %cr3
    hlt
3:  mov other_stack(%rip), %rsp
    mov $0x28, %ax
    ltr %ax
    lea -8(%rsp), %rax
    pushq $0x1B
    push %rax
    pushq $0x3002
    pushq $0x23
    pushq $other_main
    iretq

# Where it begins, in real mode: copied to low memory before.
    .section .data
    .globl trampoline, trampoline_end, other_stack, task_access
    .code16
trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl trampoline_gdt - trampoline
    mov %cr4, %eax
    or $0x620, %eax             # physical address extension, SSE
    mov %eax, %cr4
    mov trampoline_tables - trampoline, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx       # long mode
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $~0x60000004, %eax
    or $0x80000003, %eax
    mov %eax, %cr0
    ljmpl $0x08, $other_cpu
trampoline_gdt:
    .word 55
    .long gdt
trampoline_tables:
    .long 0
trampoline_end:
    .code64
    .balign 8
other_stack: .quad 0
    .globl other_fault
other_fault: .long 0

    .section .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF   # 0x08 code, ring 0
    .quad 0x00CF93000000FFFF   # 0x10 data, ring 0
    .quad 0x00CFF3000000FFFF   # 0x18 data, ring 3
    .quad 0x00AFFB000000FFFF   # 0x20 code, ring 3
task_descriptor:               # 0x28
    .word task_end - task - 1, 0
    .byte 0
task_access:
    .byte 0x89, 0, 0
    .quad 0
gdt_pointer:
    .word 55
    .quad gdt
    .globl zero_page
zero_page: .quad 0
    .globl stay_in_kernel
stay_in_kernel: .long 0

    .balign 16
task:
    .skip 102
    .word 104
    .skip 0x800 / 8
    .byte 0xFF
task_end:

    .section .bss
    .balign 16
    .skip 65536
stack_top:

# What the compiler expects of a C library, and of a runtime.
    .section .text.runtime, "ax"
    .globl memset, memcpy, memmove, memcmp, bcmp, strlen, rust_eh_personality
memset:
    mov %rdi, %r8
    mov %esi, %eax
    mov %rdx, %rcx
    rep stosb
    mov %r8, %rax
    ret
memmove:
    mov %rdi, %rax
    sub %rsi, %rax
    cmp %rdx, %rax
    jae memcpy
    mov %rdi, %rax
    mov %rdx, %rcx
    lea -1(%rdi,%rdx), %rdi
    lea -1(%rsi,%rdx), %rsi
    std
    rep movsb
    cld
    ret
memcpy:
    mov %rdi, %rax
    mov %rdx, %rcx
    rep movsb
    ret
bcmp:
memcmp:
    xor %eax, %eax
1:  test %rdx, %rdx
    jz 2f
    movzbl (%rdi), %eax
    movzbl (%rsi), %ecx
    inc %rdi
    inc %rsi
    dec %rdx
    sub %ecx, %eax
    jz 1b
2:  ret
strlen:
    xor %eax, %eax
1:  cmpb $0, (%rdi,%rax)
    je 2f
    inc %rax
    jmp 1b
2:  ret
rust_eh_personality:
    ud2
