//! GRUB's script language, as far as menus need it: text to statements.
//!
//! Commands, quotes, variables, `if`, `menuentry` and `submenu`. Loops and functions are read over: no menu that
//! `grub-mkconfig` writes chooses a kernel in one.

use std::collections::VecDeque;

/// How deep blocks may be in blocks.
const MAX_DEPTH: usize = 24;

/// A part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// As it is.
    Text(String),
    /// The value of a variable.
    Variable(String),
}

/// A word, before variables have their values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Word {
    pub pieces: Vec<Piece>,
    /// It stays a word when it is empty.
    pub quoted: bool,
}

impl Word {
    fn plain(&self) -> Option<&str> {
        match &self.pieces[..] {
            [Piece::Text(text)] if !self.quoted => Some(text),
            _ => None,
        }
    }

    fn push(&mut self, c: char) {
        match self.pieces.last_mut() {
            Some(Piece::Text(text)) => text.push(c),
            _ => self.pieces.push(Piece::Text(c.to_string())),
        }
    }
}

/// What a script does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// A command with its words.
    Command(Vec<Word>),
    /// `menuentry`, `submenu`: the words behind, and what is done when it is chosen.
    Item { submenu: bool, words: Vec<Word>, body: Vec<Statement> },
    /// Conditions and what is done then, in order; `else` has none.
    If(Vec<(Vec<Statement>, Vec<Statement>)>),
}

enum Token {
    Word(Word),
    End,
}

/// Reads a script.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<Vec<Statement>, String> {
    let mut parser = Parser { tokens: tokens(text), depth: 0 };
    let statements = parser.block(&[])?;
    match parser.tokens.is_empty() {
        true => Ok(statements),
        false => Err("has an end of a block that does not begin".to_owned()),
    }
}

fn tokens(text: &str) -> VecDeque<Token> {
    let mut tokens = VecDeque::new();
    let mut chars = text.chars().peekable();
    let mut word: Option<Word> = None;
    while let Some(c) = chars.next() {
        match c {
            '#' if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
            ' ' | '\t' | '\r' | '\n' | ';' => {
                tokens.extend(word.take().map(Token::Word));
                if matches!(c, '\n' | ';') {
                    tokens.push_back(Token::End);
                }
            }
            '\\' if chars.peek() == Some(&'\n') => drop(chars.next()),
            _ => {
                let word = word.get_or_insert_with(Word::default);
                match c {
                    '\\' => chars.next().into_iter().for_each(|c| word.push(c)),
                    '\'' => {
                        word.quoted = true;
                        while let Some(c) = chars.next().filter(|c| *c != '\'') {
                            word.push(c);
                        }
                    }
                    '"' => double_quoted(&mut chars, word),
                    '$' => variable(&mut chars, word),
                    c => word.push(c),
                }
            }
        }
    }
    tokens.extend(word.map(Token::Word));
    tokens
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn double_quoted(chars: &mut Chars<'_>, word: &mut Word) {
    word.quoted = true;
    while let Some(c) = chars.next().filter(|c| *c != '"') {
        match (c, chars.peek()) {
            ('\\', Some('"' | '\\' | '$')) => chars.next().into_iter().for_each(|c| word.push(c)),
            ('$', _) => variable(chars, word),
            _ => word.push(c),
        }
    }
}

/// The name behind `$`.
fn variable(chars: &mut Chars<'_>, word: &mut Word) {
    let mut name = String::new();
    if chars.next_if_eq(&'{').is_some() {
        while let Some(c) = chars.next().filter(|c| *c != '}') {
            name.push(c);
        }
    } else {
        while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
            name.push(c);
        }
    }
    match name.is_empty() {
        true => word.push('$'),
        false => word.pieces.push(Piece::Variable(name)),
    }
}

struct Parser {
    tokens: VecDeque<Token>,
    depth: usize,
}

impl Parser {
    /// The word that is next, if it has no quotes and no variables.
    fn next_plain(&self) -> Option<&str> {
        match self.tokens.front() {
            Some(Token::Word(word)) => word.plain(),
            _ => None,
        }
    }

    /// Statements, up to one of these words, which is left.
    fn block(&mut self, ends: &[&str]) -> Result<Vec<Statement>, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("has more than {MAX_DEPTH} blocks in one another"));
        }
        let mut statements = Vec::new();
        loop {
            match self.next_plain() {
                Some(word) if ends.contains(&word) || (self.depth == 1 && word == "}") => break,
                Some("if") => statements.push(self.condition()?),
                Some("function") => {
                    self.words();
                    self.braces()?;
                }
                Some("while" | "until" | "for") => {
                    self.words();
                    self.until("do")?;
                    self.until("done")?;
                }
                _ => match self.tokens.front() {
                    None => break,
                    Some(Token::End) => drop(self.tokens.pop_front()),
                    Some(Token::Word(_)) => statements.push(self.command()?),
                },
            }
        }
        self.depth -= 1;
        Ok(statements)
    }

    /// A block up to this word, which is taken.
    fn until(&mut self, end: &str) -> Result<Vec<Statement>, String> {
        let statements = self.block(&[end])?;
        self.tokens.pop_front().map(|_| statements).ok_or_else(|| format!("ends where '{end}' is missing"))
    }

    fn braces(&mut self) -> Result<Vec<Statement>, String> {
        while matches!(self.tokens.front(), Some(Token::End)) {
            self.tokens.pop_front();
        }
        if self.next_plain() != Some("{") {
            return Err("has an item without '{'".to_owned());
        }
        self.tokens.pop_front();
        self.until("}")
    }

    /// The words of a command, up to its end or `{`.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while self.next_plain() != Some("{") {
            match self.tokens.pop_front() {
                Some(Token::Word(word)) => words.push(word),
                Some(Token::End) | None => break,
            }
        }
        words
    }

    fn command(&mut self) -> Result<Statement, String> {
        let submenu = match self.next_plain() {
            Some("menuentry") => false,
            Some("submenu") => true,
            // A brace that belongs to nothing is a command that there is not.
            Some("{") => return Ok(Statement::Command(self.tokens.pop_front().into_iter().filter_map(word_of).collect())),
            _ => return Ok(Statement::Command(self.words())),
        };
        self.tokens.pop_front();
        let words = self.words();
        let body = self.braces()?;
        Ok(Statement::Item { submenu, words, body })
    }

    fn condition(&mut self) -> Result<Statement, String> {
        let mut arms = Vec::new();
        loop {
            // `if`, `elif` or `else`.
            let last = self.next_plain() == Some("else");
            self.tokens.pop_front();
            let condition = if last { Vec::new() } else { self.until("then")? };
            let body = self.block(&["elif", "else", "fi"])?;
            arms.push((condition, body));
            match self.next_plain() {
                Some("elif" | "else") if !last => {}
                Some("fi") => break,
                _ => return Err("has an 'if' without 'fi'".to_owned()),
            }
        }
        self.tokens.pop_front();
        Ok(Statement::If(arms))
    }
}

fn word_of(token: Token) -> Option<Word> {
    match token {
        Token::Word(word) => Some(word),
        Token::End => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_text_it_is_read_or_refused() {
        // Every text of up to seven of these, so also every way in which blocks don't match.
        let parts = ["if ", "then;", "fi\n", "{ ", "}\n", "menuentry ", "else ", "'", "\"", "$", "x ", "for ", "done;", "\\"];
        let mut text = String::new();
        let mut state = 7_u64;
        for _ in 0..20_000 {
            text.clear();
            for _ in 0..state % 12 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                text.push_str(parts[(state >> 33) as usize % parts.len()]);
            }
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) >> 1;
            let _ = parse(&text);
        }
    }

    #[test]
    fn depth_is_bounded() {
        assert!(parse(&"if ".repeat(1_000_000)).is_err());
        assert!(parse(&"submenu x {\n".repeat(100_000)).is_err());
    }
}
