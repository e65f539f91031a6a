//! Generates the messages of `proto/cri.proto`.

use std::path::Path;

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto/cri.proto");
    let out =
        std::env::var_os("OUT_DIR").ok_or_else(|| std::io::Error::other("OUT_DIR is not set by cargo"))?;
    Codegen::new()
        .inputs(["proto/cri.proto"])
        .include("proto")
        .out_dir(&out)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // The generators' own mod.rs starts with an inner attribute, which `include!` does not take.
    std::fs::write(Path::new(&out).join("modules.rs"), "pub mod cri;\n")
}
