//! What each option does.

use super::data::{Data, Malformed, text};
use super::{Catalog, ExportInfo, Handshake, Session, Step, TlsPolicy, error, reply};
use crate::codec::{MAX_PAYLOAD, MAX_STRING, PREFERRED_BLOCK, Style, info, option, option_reply, transmission_flag};
use crate::context::Context;

/// Contexts of a session at most: a reply has a chunk for each.
const MAX_CONTEXTS: usize = 64;
const NO_EXPORT: &str = "there is no such export";

/// Why an option is refused: the reply, and a message.
struct Refusal(u32, &'static str);

impl From<Malformed> for Refusal {
    fn from(Malformed(message): Malformed) -> Self {
        Self(option_reply::ERR_INVALID, message)
    }
}

type Result<T> = std::result::Result<T, Refusal>;

impl Handshake {
    pub(super) fn option(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Step {
        match self.try_option(option, data, catalog, out) {
            Ok(step) => step,
            // The one option whose failure can't be told.
            Err(_) if option == option::EXPORT_NAME => Step::End,
            Err(Refusal(kind, message)) => {
                error(out, option, kind, message);
                Step::More
            }
        }
    }

    fn try_option(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step> {
        self.check_allowed(option)?;
        match option {
            option::ABORT => {
                reply(out, option, option_reply::ACK, &[]);
                return Ok(Step::End);
            }
            option::EXPORT_NAME => return self.export_name(data, catalog, out),
            option::GO | option::INFO => return self.describe(option, data, catalog, out),
            option::STARTTLS => {
                self.start_tls(data)?;
                reply(out, option, option_reply::ACK, &[]);
                return Ok(Step::StartTls);
            }
            option::LIST => {
                Data::new(data).end()?;
                list(catalog, out);
            }
            option::STRUCTURED_REPLY => {
                Data::new(data).end()?;
                if self.style == Style::Extended {
                    return Err(Refusal(option_reply::ERR_EXT_HEADER_REQD, "extended headers include structured replies"));
                }
                self.style = Style::Structured;
            }
            option::EXTENDED_HEADERS => {
                Data::new(data).end()?;
                self.style = Style::Extended;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data, catalog, out)?,
            _ => return Err(Refusal(option_reply::ERR_UNSUP, "this option is not known here")),
        }
        reply(out, option, option_reply::ACK, &[]);
        Ok(Step::More)
    }

    fn check_allowed(&self, option: u32) -> Result<()> {
        if option == option::ABORT {
            return Ok(());
        }
        if self.shutdown {
            return Err(Refusal(option_reply::ERR_SHUTDOWN, "the server ends"));
        }
        if self.tls == TlsPolicy::Required && !self.encrypted && option != option::STARTTLS {
            return Err(Refusal(option_reply::ERR_TLS_REQD, "this server takes TLS only"));
        }
        Ok(())
    }

    fn start_tls(&self, data: &[u8]) -> Result<()> {
        Data::new(data).end()?;
        match self.tls {
            _ if self.encrypted => Err(Refusal(option_reply::ERR_INVALID, "TLS is on already")),
            TlsPolicy::Off => Err(Refusal(option_reply::ERR_POLICY, "this server has no certificate, so no TLS")),
            TlsPolicy::Offered | TlsPolicy::Required => Ok(()),
        }
    }

    fn export_name(&mut self, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step> {
        if self.style == Style::Extended {
            return Err(Refusal(option_reply::ERR_EXT_HEADER_REQD, "not with extended headers"));
        }
        let name = text(data)?;
        let export = catalog.find(name).ok_or(Refusal(option_reply::ERR_UNKNOWN, NO_EXPORT))?;
        let session = self.session(name, export);
        out.extend_from_slice(&session.export.size.to_be_bytes());
        out.extend_from_slice(&session.export.flags.to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(Step::Done(Box::new(session)))
    }

    fn describe(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step> {
        let mut data = Data::new(data);
        let name = data.string()?;
        let count = data.u16()?;
        let wanted = (0..count).map(|_| data.u16()).collect::<std::result::Result<Vec<_>, _>>()?;
        data.end()?;
        let export = catalog.find(name).ok_or(Refusal(option_reply::ERR_UNKNOWN, NO_EXPORT))?;
        let session = self.session(name, export);
        let tell = |out: &mut Vec<u8>, kind: u16, parts: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            reply(out, option, option_reply::INFO, &[&[&kind[..]], parts].concat());
        };
        let export = &session.export;
        tell(out, info::EXPORT, &[&export.size.to_be_bytes(), &export.flags.to_be_bytes()]);
        if wanted.contains(&info::NAME) {
            tell(out, info::NAME, &[export.name.as_bytes()]);
        }
        if wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            tell(out, info::DESCRIPTION, &[shortened(&export.description)]);
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            let sizes = [1, PREFERRED_BLOCK, MAX_PAYLOAD].map(u32::to_be_bytes);
            tell(out, info::BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
        }
        reply(out, option, option_reply::ACK, &[]);
        Ok(if option == option::GO { Step::Done(Box::new(session)) } else { Step::More })
    }

    /// What a session with this export would be.
    fn session(&self, name: &str, mut export: ExportInfo) -> Session {
        if self.style != Style::Simple {
            export.flags |= transmission_flag::SEND_DF;
        }
        // Contexts that were chosen for another export are none.
        let chosen = self.chosen.as_ref().filter(|(chosen_for, _)| chosen_for == name);
        let contexts = chosen.map(|(_, contexts)| contexts.clone()).unwrap_or_default();
        if self.style == Style::Extended && !contexts.is_empty() {
            export.flags |= transmission_flag::BLOCK_STATUS_PAYLOAD;
        }
        Session { export, style: self.style, contexts }
    }

    fn contexts(&mut self, option: u32, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<()> {
        let listing = option == option::LIST_META_CONTEXT;
        if !listing {
            // Whatever comes of this one, the earlier choice counts no more.
            self.chosen = None;
        }
        if self.style == Style::Simple {
            return Err(Refusal(option_reply::ERR_INVALID, "block status needs structured replies or extended headers first"));
        }
        let mut data = Data::new(data);
        let name = data.string()?;
        let count = data.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(data.string()?);
        }
        data.end()?;
        let export = catalog.find(name).ok_or(Refusal(option_reply::ERR_UNKNOWN, NO_EXPORT))?;
        let mut found: Vec<Context> = Vec::new();
        let all = if listing && queries.is_empty() { Context::all(&export.ancestors) } else { Vec::new() };
        let matching = queries.iter().flat_map(|query| Context::matching(query, listing, &export.ancestors));
        for context in all.into_iter().chain(matching) {
            // A context is told once, however often it is asked for.
            if !found.contains(&context) && found.len() < MAX_CONTEXTS {
                found.push(context);
            }
        }
        let found: Vec<(u32, Context)> = (1..).zip(found).collect();
        for (id, context) in &found {
            let id = if listing { 0 } else { *id };
            reply(out, option, option_reply::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()]);
        }
        if !listing {
            self.chosen = Some((name.to_owned(), found));
        }
        Ok(())
    }
}

fn list(catalog: &dyn Catalog, out: &mut Vec<u8>) {
    for export in catalog.list() {
        let len = (export.name.len() as u32).to_be_bytes();
        let parts = [&len[..], export.name.as_bytes(), shortened(&export.description)];
        reply(out, option::LIST, option_reply::SERVER, &parts);
    }
}

fn shortened(description: &str) -> &[u8] {
    &description.as_bytes()[..description.floor_char_boundary(MAX_STRING)]
}
