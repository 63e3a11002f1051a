//! Commands of `vhd` in messages: to be copied to a shell, whatever the names in them.

use std::fmt;
use std::path::Path;

/// A command line, its words quoted as a shell needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Command(String);

impl Command {
    /// One that begins with these words.
    pub(crate) fn new(words: &[&str]) -> Self {
        Self(words.join(" "))
    }

    /// With these words, which need no quotes.
    pub(crate) fn words(mut self, words: &[&str]) -> Self {
        for word in words {
            self.0.push(' ');
            self.0.push_str(word);
        }
        self
    }

    /// With this word, where it is wanted.
    pub(crate) fn flag(self, word: &str, wanted: bool) -> Self {
        if wanted { self.words(&[word]) } else { self }
    }

    /// With a path. One that begins with a dash is no option.
    pub(crate) fn path(self, path: &Path) -> Self {
        let text = path.to_string_lossy();
        let text = if text.starts_with('-') { format!("./{text}") } else { text.into_owned() };
        self.words(&[&quoted(&text)])
    }

    /// With an option that names a path, for each of these.
    pub(crate) fn paths<'a>(self, option: &str, paths: impl IntoIterator<Item = &'a Path>) -> Self {
        paths.into_iter().fold(self, |command, path| command.words(&[option]).path(path))
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A word for a shell: in single quotes where it holds anything that a shell may take for more than a letter.
fn quoted(text: &str) -> String {
    let is_plain = |letter: char| letter.is_alphanumeric() || "/._-+=:,@%".contains(letter);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words_to_a_shell() {
        let command = |name: &str| Command::new(&["vhd", "resize"]).path(Path::new(name)).words(&["1G"]).to_string();
        assert_eq!(command("a.vhd"), "vhd resize a.vhd 1G");
        assert_eq!(command("-a.vhd"), "vhd resize ./-a.vhd 1G");
        for name in ["x; rm -rf ~", "$(id)", "it's", "", "a b", "`id`", "a\\b", "*", "a\nb"] {
            let out =
                std::process::Command::new("sh").arg("-c").arg(format!("set -- {}; printf %s \"$3\"", command(name))).output();
            assert_eq!(String::from_utf8(out.unwrap().stdout).unwrap(), name);
        }
    }
}
