//! What tests of machines need: KVM, and the test guest, `vmm/guest`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::tools::skip;

/// Whether machines can run here, which is said where they can't.
///
/// # Panics
/// If the environment says `CI=true` and they can't.
#[must_use]
pub fn kvm() -> bool {
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            skip(&format!("/dev/kvm can't be opened: {error}"));
            false
        }
    }
}

/// The test guest, an ELF file in the folder `cache`. It is built once for each test program, so that none waits for
/// another: a second or two.
///
/// # Panics
/// When it can't be built.
#[must_use]
pub fn guest(cache: &Path) -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmm/guest/main.rs");
        let name = std::env::current_exe().unwrap().file_name().unwrap().to_string_lossy().into_owned();
        let (passing, built) = (cache.join(format!("guest-{}", std::process::id())), cache.join(format!("guest-of-{name}")));
        let link = "-nostartfiles -nostdlib -static -no-pie -Wl,--image-base=0x200000,-e,_start,--build-id=none";
        let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .args(["--edition", "2024", "--crate-type", "bin", "-C", "panic=abort", "-C", "opt-level=2"])
            .args(["-C", "relocation-model=static", "-C", &format!("link-args={link}"), "-o"])
            .arg(&passing)
            .arg(&source)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&passing, &built).unwrap();
        built
    })
}
