# A kernel of a few instructions, to be entered both ways: it says which, its command line and its initial RAM disk, and
# turns the machine off.
    .text
    .globl _start
    .code64
_start:                         # in 64-bit mode; the zero page is in RSI
    mov %rsi, %rbx
    mov $0x3F8, %edx
    mov $said_64, %esi
    call print_64
    mov 0x228(%rbx), %esi
    call print_64
    mov $said_initrd, %esi
    call print_64
    mov 0x218(%rbx), %esi
    mov 0x21C(%rbx), %ecx
    test %ecx, %ecx
    jz 2f
1:  lodsb
    out %al, %dx
    sub $1, %ecx
    jnz 1b
2:  mov $0x600, %edx
    mov $0x34, %al
    out %al, %dx
    hlt
print_64:
    lodsb
    test %al, %al
    jz 1f
    out %al, %dx
    jmp print_64
1:  ret

    .code32
pvh_start:                      # in 32-bit mode; the start info is in EBX
    mov $stack_top, %esp
    mov $0x3F8, %edx
    mov $said_wrong, %esi
    cmpl $0x336EC578, (%ebx)
    jne 1f
    mov $said_32, %esi
1:  call print_32
    mov 24(%ebx), %esi
    call print_32
    mov $said_initrd, %esi
    call print_32
    cmpl $0, 12(%ebx)
    je 3f
    mov 16(%ebx), %edi
    mov (%edi), %esi
    mov 8(%edi), %ecx
2:  lodsb
    out %al, %dx
    sub $1, %ecx
    jnz 2b
3:  mov $0x600, %edx
    mov $0x34, %al
    out %al, %dx
    hlt
print_32:
    lodsb
    test %al, %al
    jz 1f
    out %al, %dx
    jmp print_32
1:  ret

said_64: .asciz "64-bit: "
said_32: .asciz "32-bit: "
said_wrong: .asciz "no start info: "
said_initrd: .asciz "; initrd: "
    .balign 16
    .skip 256
stack_top:
    .long 0

    .section .note.Xen, "a", @note
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

    .section .note.GNU-stack, "", @progbits
