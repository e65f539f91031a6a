# shellcheck shell=bash
# Sourced by what runs the lab.

# What runs the lab in the mode $1: the machine's KVM where it can run a hypervisor in its guest, else QEMU's software CPU with its
# emulated SVM. An emulating KVM (PVM) has neither vendor module loaded.
accelerator() {
    local nested
    if [[ -n ${MAYU_LAB_ACCEL:-} ]]; then echo "$MAYU_LAB_ACCEL"; return; fi
    nested=$(cat /sys/module/kvm_{amd,intel}/parameters/nested 2>/dev/null || true)
    if [[ $1 = fast && -r /dev/kvm && -w /dev/kvm && $nested = [1Y] ]]; then echo kvm; else echo tcg; fi
}
