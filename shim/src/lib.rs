//! The shim: one process per pod.
