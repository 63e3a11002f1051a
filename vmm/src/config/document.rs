//! An XML document that is changed without being rewritten: what is not touched stays byte for byte.
//!
//! It is text and a tree of where its elements are. A change cuts into the text, and the tree is made anew.

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::{BytesRef, BytesStart, Event};

/// Bytes of a document at most: machines are described in a few thousand.
pub const MAX_BYTES: u64 = 256 << 10;
/// Elements inside each other at most.
const MAX_DEPTH: usize = 32;
/// Attributes of an element at most.
const MAX_ATTRIBUTES: usize = 32;

/// What is wrong, and at which byte of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub at: usize,
    /// What.
    pub what: String,
}

/// An element on the way to another: its name, and its `id` where there are several.
pub type Step<'a> = (&'a str, Option<u8>);

/// One element.
#[derive(Clone, Debug, Default)]
pub struct Element {
    /// Its name.
    pub name: String,
    /// Its attributes, in order.
    pub attributes: Vec<(String, String)>,
    /// The text right inside it, without the space around.
    pub text: String,
    /// The elements right inside it.
    pub children: Vec<Element>,
    /// All of it in the document.
    pub whole: Range<usize>,
    /// What is between its tags; empty and at its end for `<name/>`.
    inner: Range<usize>,
}

/// How the bytes of a file make text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Utf8 { mark: bool },
    Utf16 { little: bool },
}

/// A document.
#[derive(Clone, Debug)]
pub struct Document {
    text: String,
    root: Element,
    encoding: Encoding,
}

impl Element {
    /// An attribute.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    fn is(&self, step: Step<'_>) -> bool {
        let id = |id: u8| self.attribute("id").and_then(|text| text.trim().parse().ok()) == Some(id);
        self.name == step.0 && step.1.is_none_or(id)
    }

    /// The element at the end of a way; `None` when there is none.
    ///
    /// # Errors
    /// When there are two.
    pub fn find(&self, way: &[Step<'_>]) -> Result<Option<&Self>, Problem> {
        let mut here = self;
        for &step in way {
            let mut found = here.children.iter().filter(|child| child.is(step));
            let Some(first) = found.next() else { return Ok(None) };
            if let Some(second) = found.next() {
                return Err(Problem { at: second.whole.start, what: format!("there is a second element <{}>", step.0) });
            }
            here = first;
        }
        Ok(Some(here))
    }
}

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    /// What is not well-formed, too deep, or more than a plain document: no document types, no entities but XML's own.
    pub fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        let (text, encoding) = decode(bytes)?;
        let root = parse(&text)?;
        Ok(Self { text, root, encoding })
    }

    /// A document of one empty element.
    #[must_use]
    pub fn new(root: &str) -> Self {
        let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{root}>\n</{root}>\n");
        let root = parse(&text).unwrap_or_default();
        Self { text, root, encoding: Encoding::Utf8 { mark: false } }
    }

    /// The outermost element.
    #[must_use]
    pub fn root(&self) -> &Element {
        &self.root
    }

    /// Line and column of a byte of the text, both from 1 on.
    #[must_use]
    pub fn place(&self, at: usize) -> (usize, usize) {
        place(&self.text, at)
    }

    /// The bytes for its file, in the encoding that it came in.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self.encoding {
            Encoding::Utf8 { mark } => [if mark { MARK } else { b"" }, self.text.as_bytes()].concat(),
            Encoding::Utf16 { little } => {
                let units = std::iter::once(0xFEFF).chain(self.text.encode_utf16());
                units.flat_map(|unit| unit.rotate_left(if little { 8 } else { 0 }).to_be_bytes()).collect()
            }
        }
    }

    /// Gives the element at the end of a way this text. Elements that are missing are made, the last with this `type`.
    ///
    /// # Errors
    /// As the document is not what it should be.
    pub fn set(&mut self, way: &[Step<'_>], kind: &str, value: &str) -> Result<(), Problem> {
        let value = quick_xml::escape::escape(value).into_owned();
        if let Some(found) = self.root.find(way)? {
            let tag = self.text[found.whole.clone()].trim_end_matches("/>").trim_end().to_owned();
            return if found.inner.is_empty() && found.inner.end == found.whole.end {
                let whole = found.whole.clone();
                let closing = format!("</{}>", found.name);
                self.splice(whole, &format!("{tag}>{value}{closing}"))
            } else {
                self.splice(found.inner.clone(), &value)
            };
        }
        let there = (0..way.len()).rev().find(|&len| matches!(self.root.find(&way[..len]), Ok(Some(_)))).unwrap_or(0);
        let Some(parent) = self.root.find(&way[..there])?.cloned() else { return Ok(()) };
        let inside = nest(&way[there..], kind, &value, there + 1);
        let indent = "\t".repeat(there);
        if parent.inner.end == parent.whole.end {
            let tag = self.text[parent.whole.clone()].trim_end_matches("/>").trim_end().to_owned();
            return self.splice(parent.whole, &format!("{tag}>\n{inside}{indent}</{}>", parent.name));
        }
        // Before the space that stands in front of the closing tag.
        let inner = &self.text[parent.inner.clone()];
        let at = parent.inner.start + inner.trim_end().len();
        let at = if self.text[at..parent.inner.end].contains('\n') { at } else { parent.inner.end };
        let rest = if self.text[at..parent.inner.end].is_empty() { format!("\n{indent}") } else { String::new() };
        self.splice(at..at, &format!("\n{}{rest}", inside.trim_end_matches('\n')))
    }

    /// Takes the element at the end of a way out, with the space in front of it.
    ///
    /// # Errors
    /// As the document is not what it should be.
    pub fn remove(&mut self, way: &[Step<'_>]) -> Result<(), Problem> {
        let Some(found) = self.root.find(way)? else { return Ok(()) };
        let start = self.text[..found.whole.start].trim_end_matches([' ', '\t']).trim_end_matches('\n').len();
        self.splice(start..found.whole.end, "")
    }

    fn splice(&mut self, range: Range<usize>, new: &str) -> Result<(), Problem> {
        let mut text = self.text.clone();
        text.replace_range(range, new);
        self.root = parse(&text)?;
        self.text = text;
        Ok(())
    }
}

/// New elements inside each other, a line each.
fn nest(way: &[Step<'_>], kind: &str, value: &str, depth: usize) -> String {
    let Some(&(name, id)) = way.first() else { return String::new() };
    let indent = "\t".repeat(depth);
    let id = id.map_or_else(String::new, |id| format!(" id=\"{id}\""));
    if way.len() == 1 {
        return format!("{indent}<{name}{id} type=\"{kind}\">{value}</{name}>\n");
    }
    format!("{indent}<{name}{id}>\n{}{indent}</{name}>\n", nest(&way[1..], kind, value, depth + 1))
}

const MARK: &[u8] = b"\xEF\xBB\xBF";

/// Virtual Server wrote UTF-16 with a mark; everyone else writes UTF-8.
fn decode(bytes: &[u8]) -> Result<(String, Encoding), Problem> {
    let utf16 = |little: bool| {
        let units = bytes[2..].chunks(2).map(|pair| match *pair {
            [first, second] if little => u16::from_be_bytes([second, first]),
            [first, second] => u16::from_be_bytes([first, second]),
            _ => 0xDFFF,
        });
        let text: Result<String, _> = char::decode_utf16(units).collect();
        text.map_err(|_| Problem { at: 0, what: "is no UTF-16, as its first bytes say".into() })
            .map(|text| (text, Encoding::Utf16 { little }))
    };
    match bytes {
        [0xFF, 0xFE, ..] => utf16(true),
        [0xFE, 0xFF, ..] => utf16(false),
        _ => {
            let mark = bytes.starts_with(MARK);
            let rest = if mark { &bytes[MARK.len()..] } else { bytes };
            match std::str::from_utf8(rest) {
                Ok(text) => Ok((text.to_owned(), Encoding::Utf8 { mark })),
                Err(error) => {
                    let (line, column) = place(&String::from_utf8_lossy(&rest[..error.valid_up_to()]), error.valid_up_to());
                    Err(Problem { at: 0, what: format!("line {line}, column {column}: is neither UTF-8 nor UTF-16") })
                }
            }
        }
    }
}

/// Line and column of a byte.
pub fn place(text: &str, at: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..at.min(text.len())];
    let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
    (before.iter().filter(|byte| **byte == b'\n').count() + 1, column)
}

fn parse(text: &str) -> Result<Element, Problem> {
    let mut reader = Reader::from_str(text);
    // Around the root there is nothing but comments.
    let mut open = vec![Element::default()];
    loop {
        let at = usize::try_from(reader.buffer_position()).unwrap_or(text.len());
        let wrong = |what: String| Err(Problem { at, what });
        let event = match reader.read_event() {
            Ok(event) => event,
            Err(error) => {
                let at = usize::try_from(reader.error_position()).unwrap_or(at);
                return Err(Problem { at, what: error.to_string() });
            }
        };
        let end = usize::try_from(reader.buffer_position()).unwrap_or(text.len());
        let depth = open.len();
        let Some(inside) = open.last_mut() else { return wrong("an element ends that did not begin".into()) };
        match event {
            Event::Start(_) if depth > MAX_DEPTH => return wrong(format!("more than {MAX_DEPTH} elements inside each other")),
            Event::Start(tag) => open.push(element(&tag, at, end)?),
            Event::Empty(tag) => inside.children.push(element(&tag, at, end)?),
            Event::End(_) => {
                inside.text = inside.text.trim().to_owned();
                (inside.inner.end, inside.whole.end) = (at, end);
                let Some(done) = open.pop() else { continue };
                let Some(outside) = open.last_mut() else { return wrong("an element ends that did not begin".into()) };
                outside.children.push(done);
            }
            Event::Text(content) => inside.text.push_str(&content.xml10_content()),
            Event::CData(content) => inside.text.push_str(&content.xml10_content()),
            Event::GeneralRef(name) => match resolve(&name) {
                Some(character) => inside.text.push(character),
                None => return wrong(format!("&{}; is no entity of plain XML", &*name)),
            },
            Event::DocType(_) => return wrong("a document type is not read here".into()),
            Event::Eof => break,
            Event::Comment(_) | Event::PI(_) | Event::Decl(_) => {}
        }
    }
    finish(open, text)
}

fn finish(mut open: Vec<Element>, text: &str) -> Result<Element, Problem> {
    let outermost = open.swap_remove(0);
    if let Some(unclosed) = open.last() {
        return Err(Problem { at: unclosed.whole.start, what: format!("<{}> has no end", unclosed.name) });
    }
    if !outermost.text.trim().is_empty() {
        return Err(Problem { at: 0, what: "there is text outside of all elements".into() });
    }
    let mut roots = outermost.children.into_iter();
    match (roots.next(), roots.next()) {
        (Some(root), None) => Ok(root),
        (None, _) => Err(Problem { at: text.len(), what: "there is no element".into() }),
        (_, Some(second)) => Err(Problem { at: second.whole.start, what: "there is a second outermost element".into() }),
    }
}

fn element(tag: &BytesStart<'_>, at: usize, end: usize) -> Result<Element, Problem> {
    let mut attributes = Vec::new();
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|error| Problem { at, what: error.to_string() })?;
        if attributes.len() == MAX_ATTRIBUTES {
            return Err(Problem { at, what: format!("more than {MAX_ATTRIBUTES} attributes") });
        }
        let value = attribute.normalized_value(quick_xml::XmlVersion::Implicit1_0);
        let value = value.map_err(|error| Problem { at, what: error.to_string() })?.into_owned();
        attributes.push((attribute.key.into_inner().to_owned(), value));
    }
    let name = tag.name().into_inner().to_owned();
    Ok(Element { name, attributes, text: String::new(), children: Vec::new(), whole: at..end, inner: end..end })
}

fn resolve(name: &BytesRef<'_>) -> Option<char> {
    match &**name {
        "lt" => Some('<'),
        "gt" => Some('>'),
        "amp" => Some('&'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        _ => name.resolve_char_ref().ok().flatten(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "<?xml version=\"1.0\"?>\n<!-- mine -->\n<a x='1'>\n\t<b type=\"integer\">5</b>\n\t<other><!-- kept --> <q/></other>\n</a>\n";

    #[test]
    fn what_is_not_changed_stays_byte_for_byte() {
        let mut document = Document::parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!(document.to_bytes(), SAMPLE.as_bytes());
        document.set(&[("b", None)], "integer", "6 < 7").unwrap();
        assert_eq!(document.text, SAMPLE.replace(">5<", ">6 &lt; 7<"));
        assert_eq!(document.root().find(&[("b", None)]).unwrap().unwrap().text, "6 < 7");
        document.set(&[("c", None), ("d", Some(3)), ("e", None)], "string", "new").unwrap();
        let added = "\t<c>\n\t\t<d id=\"3\">\n\t\t\t<e type=\"string\">new</e>\n\t\t</d>\n\t</c>\n</a>";
        assert!(document.text.contains(added), "{}", document.text);
        document.set(&[("other", None), ("q", None), ("r", None)], "string", "deep").unwrap();
        assert!(document.text.contains("<!-- kept --> <q>\n"), "{}", document.text);
        document.remove(&[("other", None), ("q", None)]).unwrap();
        document.remove(&[("c", None)]).unwrap();
        document.set(&[("b", None)], "integer", "5").unwrap();
        assert_eq!(document.text, SAMPLE.replace(" <q/>", ""));
    }

    #[test]
    fn utf_16_stays_utf_16() {
        for little in [true, false] {
            let document = Document { encoding: Encoding::Utf16 { little }, ..Document::parse(SAMPLE.as_bytes()).unwrap() };
            let bytes = document.to_bytes();
            assert_eq!(bytes[0] == 0xFF, little);
            let mut again = Document::parse(&bytes).unwrap();
            assert!(again.text == SAMPLE && again.to_bytes() == bytes);
            again.set(&[("b", None)], "integer", "\u{1F600}").unwrap();
            assert_eq!(Document::parse(&again.to_bytes()).unwrap().text, again.text);
        }
    }

    #[test]
    fn what_is_no_plain_document_is_refused_with_its_place() {
        let deep = "<a>".repeat(100) + &"</a>".repeat(100);
        let cases = [
            ("<a>\n <b>\n</a>", (3, 1)),
            ("<a><b></b>", (1, 1)),
            ("<a>\n&bomb;</a>", (2, 1)),
            ("<!DOCTYPE a [<!ENTITY x \"yyyy\">]><a>&x;</a>", (1, 1)),
            ("<a/><b/>", (1, 5)),
            ("text", (1, 1)),
            ("", (1, 1)),
            (&deep, (1, 97)),
            ("<a>\n\t<b x=1/></a>", (2, 2)),
        ];
        for (text, place_of) in cases {
            let problem = Document::parse(text.as_bytes()).expect_err(text);
            assert_eq!(place(text, problem.at), place_of, "{text}: {}", problem.what);
        }
        assert!(Document::parse(b"\xFF\xFE<\0a\0/\0>\0x").is_err());
        assert!(Document::parse(b"<a>\xC3\x28</a>").unwrap_err().what.contains("line 1, column 4"));
    }
}
