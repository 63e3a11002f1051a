//! The small Linux, built when it is first needed and kept: `vmm/tests/linux` is its recipe.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Says something past the test harness, which hides what tests say that pass.
pub fn say(what: &str) {
    let _ = writeln!(io::stderr(), "{what}");
}

/// Whether KVM is the processor's. On a software KVM (`kvm_pvm`) no program runs, and kernels slowly.
pub fn hardware_kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") && !Path::new("/sys/module/kvm_pvm").exists()
}

/// The folder with `vmlinux`, `bzImage-gzip`, `bzImage-zstd` and `bzImage-lz4`. Where `CI=true` it must be possible.
pub fn linux() -> Option<PathBuf> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/linux");
    let Some(source) = version_of_source() else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must have the package linux-source-6.1");
        say("SKIPPED: a small Linux is built from the package linux-source-6.1, which is not installed");
        return None;
    };
    let mut hash = DefaultHasher::new();
    (source, fs::read(recipe.join("build")).unwrap(), fs::read(recipe.join("config")).unwrap()).hash(&mut hash);
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let built = cache.join(format!("linux-{:016x}", hash.finish()));
    // Others wait for who builds it, be they threads or processes.
    let lock = File::create(cache.join("linux.lock")).unwrap();
    lock.lock().unwrap();
    if !built.exists() {
        let begin = Instant::now();
        let passing = cache.join("linux-being-built");
        let _ = fs::remove_dir_all(&passing);
        say(&format!("building a small Linux, once: {}", built.display()));
        let output = Command::new(recipe.join("build")).arg(&passing).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&passing, &built).unwrap();
        say(&format!("a small Linux was built in {} s", begin.elapsed().as_secs()));
    }
    Some(built)
}

fn version_of_source() -> Option<String> {
    let output = Command::new("dpkg-query").args(["-W", "-f", "${Status} ${Version}", "linux-source-6.1"]).output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    said.strip_prefix("install ok installed ").map(str::to_owned)
}
