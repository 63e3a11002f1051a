//! The style that no lint knows.
//!
//! Goal: code and documents that one can hold in one's head and trust. Method: read all of the project's own text.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use support::{files_below, project};

/// Lines of a file without its tests.
const MAX_FILE: usize = 600;
/// Lines of a function, its signature and last brace counted.
const MAX_FUNCTION: usize = 70;

/// All files with these endings, their names from the project's folder on, and their text.
fn texts(suffixes: &[&str]) -> Vec<(PathBuf, String)> {
    let files = files_below(project(), suffixes).into_iter();
    let texts: Vec<_> =
        files.map(|path| (path.strip_prefix(project()).unwrap().to_owned(), fs::read_to_string(&path).unwrap())).collect();
    assert!(!texts.is_empty(), "no files like {suffixes:?}");
    texts
}

fn assert_none(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// The code of a file: up to its tests, which stand last.
fn without_tests(text: &str) -> &str {
    text.split_once("#[cfg(test)]\nmod ").map_or(text, |(code, _)| code)
}

#[test]
fn files_are_short() {
    let sources = texts(&[".rs"]).into_iter().filter(|(path, _)| path.components().any(|part| part.as_os_str() == "src"));
    let lines = sources.map(|(path, text)| (path, without_tests(&text).lines().count()));
    let long = lines.filter(|(_, lines)| *lines > MAX_FILE);
    assert_none(long.map(|(path, lines)| format!("{}: {lines} lines, {MAX_FILE} at most", path.display())).collect());
}

/// Whether a line of formatted code begins a function.
fn begins_function(line: &str) -> bool {
    let mut words = line.split_whitespace().skip_while(|word| {
        word.starts_with("pub") || ["in", "const", "async", "unsafe", "extern", "\"C\"", "default"].contains(word)
    });
    words.next() == Some("fn")
}

#[test]
fn functions_are_short() {
    let mut long = Vec::new();
    for (path, text) in texts(&[".rs"]) {
        let lines: Vec<_> = text.lines().collect();
        for (first, line) in lines.iter().enumerate().filter(|(_, line)| begins_function(line)) {
            // Formatted code ends a function at the indent at which it began.
            let indent = &line[..line.len() - line.trim_start().len()];
            let ends = |line: &&str| *line == format!("{indent}}}") || line.starts_with(&format!("{indent}fn "));
            let one_line = line.ends_with('}') || line.ends_with(';');
            let length = if one_line { 1 } else { lines[first + 1..].iter().position(ends).map_or(0, |more| more + 2) };
            if length > MAX_FUNCTION {
                long.push(format!("{}:{}: a function of {length} lines, {MAX_FUNCTION} at most", path.display(), first + 1));
            }
        }
    }
    assert_none(long);
}

/// Reports every line that holds one of `words`, whatever its case.
fn assert_absent(suffixes: &[&str], words: &[&str]) {
    let mut found = Vec::new();
    for (path, text) in texts(suffixes) {
        for (index, line) in text.lines().enumerate() {
            let line = line.to_lowercase();
            found.extend(
                words
                    .iter()
                    .filter(|word| line.contains(&word.to_lowercase()))
                    .map(|word| format!("{}:{}: {word}", path.display(), index + 1)),
            );
        }
    }
    assert_none(found);
}

#[test]
fn nothing_is_left_unfinished() {
    assert_absent(&[".rs"], &[concat!("FIX", "ME"), concat!("dbg", "!(")]);
}

#[test]
fn words_are_those_of_the_glossary() {
    // It is a block, and it is a parent.
    assert_absent(&[".rs", ".md"], &[concat!("clus", "ter"), concat!("backing", " file")]);
}

#[test]
fn nobodys_machine_is_named() {
    assert_absent(&[".rs", ".md", ".toml", "run", "test", "demo", "make"], &[concat!("/wor", "k/"), concat!("/ro", "ot/")]);
}

/// The crate that needs `unsafe`, and the modules in which it may be.
const UNSAFE_CRATE: &str = "vmm/Cargo.toml";
const UNSAFE_MODULES: [&str; 2] = ["vmm/src/kvm/mod.rs", "vmm/src/memory.rs"];
/// A program for bare metal, which is no part of what runs on the host.
const BARE_METAL: &str = "vmm/guest";

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    let lenient = texts(&["Cargo.toml"]).into_iter().filter(|(path, text)| {
        // Its own table forbids as much, but for what two modules are allowed.
        let own = path == Path::new(UNSAFE_CRATE) && text.contains("unsafe_code = \"deny\"");
        !own && !path.starts_with("fuzz") && !text.contains("[lints]\nworkspace = true")
    });
    assert_none(lenient.map(|(path, _)| format!("{}: no [lints] of the workspace", path.display())).collect());
}

#[test]
fn unsafe_code_is_in_two_modules_and_each_block_says_why_it_is_sound() {
    let mut wrong = Vec::new();
    for (path, text) in texts(&[".rs"]).into_iter().filter(|(path, _)| !path.starts_with(BARE_METAL)) {
        let may = UNSAFE_MODULES.iter().any(|module| path == Path::new(module));
        if !may && text.contains(concat!("allow(unsafe", "_code")) {
            wrong.push(format!("{}: allows unsafe code", path.display()));
        }
        let (blocks, reasons) = (text.matches(concat!("unsafe", " {")).count(), text.matches(concat!("// SAF", "ETY:")).count());
        if may && blocks != reasons {
            wrong.push(format!("{}: {blocks} blocks of unsafe code, {reasons} reasons", path.display()));
        }
    }
    assert_none(wrong);
}

/// A guest changes its memory as it likes, so that no reference may lead there.
#[test]
fn nobody_makes_a_slice_of_a_guests_memory() {
    let wrong = texts(&[".rs"]).into_iter().filter(|(path, text)| path.starts_with("vmm/src") && text.contains("from_raw_parts"));
    assert_none(wrong.map(|(path, _)| format!("{}: makes a slice of an address", path.display())).collect());
}

/// The targets of a document's links, those to other places and within the page left out.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let targets = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
    targets.map(|target| target.split_once('#').map_or(target, |(file, _)| file)).collect()
}

/// Documents that a text names by their path from the project's folder: `docs/format.md`.
fn named_documents(text: &str) -> Vec<&str> {
    let starts = text.match_indices("docs/").map(|(at, _)| &text[at..]);
    let ends = starts.filter_map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"/-_.".contains(c)).unwrap_or(rest.len());
        let name = rest[..end].trim_end_matches('.');
        name.ends_with(".md").then_some(name)
    });
    ends.collect()
}

#[test]
fn what_is_referred_to_exists() {
    let mut dead = Vec::new();
    for (path, text) in texts(&[".md"]) {
        let folder = project().join(path.parent().unwrap_or(Path::new("")));
        dead.extend(
            links(&text).into_iter().filter(|link| !folder.join(link).exists()).map(|link| format!("{}: {link}", path.display())),
        );
    }
    for (path, text) in texts(&[".rs", ".md"]) {
        let missing = named_documents(&text).into_iter().filter(|name| !project().join(name).exists());
        dead.extend(missing.map(|name| format!("{}: {name}", path.display())));
    }
    assert_none(dead);
}

/// All files, and the folders that they are in.
fn all_paths() -> Vec<PathBuf> {
    let files = files_below(project(), &[""]);
    let below = files.iter().flat_map(|file| file.ancestors()).filter_map(|path| path.strip_prefix(project()).ok());
    let paths: BTreeSet<_> = below.filter(|path| *path != Path::new("")).map(Path::to_owned).collect();
    paths.into_iter().collect()
}

/// What a text has between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).filter(|name| !name.is_empty())
}

/// Whether this is meant to be a file or a folder of the project: `vmm/guest`, `format/locator.rs`.
fn is_own_path(name: &str) -> bool {
    let is_path = name.chars().all(|c| c.is_ascii_alphanumeric() || "/-_.*".contains(c)) && !name.starts_with('/');
    // What a run makes is not there before.
    let is_made = name.contains("TARGET") || name.starts_with("target/");
    let begins = name.split_once('/').is_some_and(|(first, _)| project().join(first).is_dir());
    is_path && !is_made && (begins || name.ends_with(".rs"))
}

/// Whether a path ends with what it is called; a `*` in its last part stands for anything.
fn is_called(path: &Path, name: &str) -> bool {
    let name = Path::new(name.trim_end_matches('/'));
    let last = name.file_name().unwrap_or_default().to_string_lossy();
    let Some((begin, end)) = last.split_once('*') else { return path.ends_with(name) };
    let (folder, found) = (path.parent().unwrap_or(path), path.file_name().unwrap_or_default().to_string_lossy());
    let rest = found.strip_prefix(begin).and_then(|rest| rest.strip_suffix(end));
    rest.is_some() && folder.ends_with(name.parent().unwrap_or(Path::new("")))
}

#[test]
fn paths_that_texts_name_exist() {
    let paths = all_paths();
    let mut dead = Vec::new();
    for (path, text) in texts(&[".rs", ".md"]) {
        let names = quoted(&text).filter(|name| is_own_path(name) && !project().join(name).exists());
        let missing = names.filter(|name| !paths.iter().any(|path| is_called(path, name)));
        dead.extend(missing.map(|name| format!("{}: {name}", path.display())));
    }
    assert_none(dead);
}

/// The test programs, as `tests/cli` or `vhd-core/tests/loom.rs`.
fn test_programs() -> Vec<PathBuf> {
    let of = |path: PathBuf| match path.file_name()?.to_str()? {
        "main.rs" => Some(path.parent()?.to_owned()),
        name => name.ends_with(".rs").then_some(path),
    };
    let programs = all_paths().into_iter().filter_map(of);
    programs.filter(|path| path.parent().is_some_and(|folder| folder.ends_with("tests"))).collect()
}

#[test]
fn every_test_program_is_on_the_page_of_tests() {
    let page = fs::read_to_string(project().join("docs/testing.md")).unwrap();
    let programs = test_programs();
    assert!(programs.iter().any(|path| path == Path::new("tests/cli")) && programs.len() > 50, "{programs:?}");
    let is_told = |path: &Path| quoted(&page).any(|name| is_called(path, name) || is_called(&path.with_extension(""), name));
    let untold = programs.iter().filter(|path| !is_told(path));
    assert_none(untold.map(|path| format!("docs/testing.md does not name {}", path.display())).collect());
}

#[test]
fn the_counters_count() {
    assert!(begins_function("    pub(crate) async fn x() {") && begins_function("fn x() {") && !begins_function("// fn x"));
    assert_eq!(without_tests("code\n#[cfg(test)]\nmod tests {\n}"), "code\n");
    assert_eq!(links("[a](b.md#c) [d](https://e) [f](#g)"), ["b.md"]);
    assert_eq!(quoted("`a` b `c`\n```sh\n").collect::<Vec<_>>(), ["a", "c", "sh"]);
    assert!(is_own_path("vmm/guest") && is_own_path("image/write.rs") && !is_own_path("nbd/x") && !is_own_path("a b.rs"));
    let path = Path::new("vhd-core/tests/bad_hosts.rs");
    assert!(is_called(path, "tests/bad_hosts.rs") && is_called(path, "vhd-core/tests/bad_*.rs") && !is_called(path, "hosts.rs"));
    assert_eq!(named_documents("see docs/format.md, or docs/."), ["docs/format.md"]);
}
