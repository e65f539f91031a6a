//! The MMIO transport.
