//! The style that no lint knows.
//!
//! Goal: code and documents that one can hold in one's head and trust. Method: read all of the project's own text.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

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

#[test]
fn the_counters_count() {
    assert!(begins_function("    pub(crate) async fn x() {") && begins_function("fn x() {") && !begins_function("// fn x"));
    assert_eq!(without_tests("code\n#[cfg(test)]\nmod tests {\n}"), "code\n");
    assert_eq!(links("[a](b.md#c) [d](https://e) [f](#g)"), ["b.md"]);
    assert_eq!(named_documents("see docs/format.md, or docs/."), ["docs/format.md"]);
}
