//! x86_64: a PC reduced to local APICs, an IOAPIC, a serial port and a reset line.

pub mod boot;
pub mod cpuid;
mod gdt;
pub mod layout;
mod mptable;
mod registers;
pub mod state;
