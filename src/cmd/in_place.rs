//! `vhd convert --in-place`

use std::path::Path;

use serde::Serialize;
use vhd_core::Error;
use vhd_core::chain::{ChainOptions, is_vhd_name};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};

use crate::output::{Answer, Context, ShownPath, goes_on};
use crate::sizes;

/// The JSON of `vhd convert --in-place`.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    from: &'static str,
    #[serde(rename = "type")]
    to: &'static str,
    virtual_size: u64,
    data: u64,
    resumed: bool,
    done: bool,
}

/// Converts the file at `path` where it is.
pub fn run(path: &Path, options: &InPlaceOptions, chain: &ChainOptions, context: &Context) -> Result<Answer, Error> {
    let converted = context.with_progress("convert", |progress| convert_in_place(path, options, chain, progress));
    let converted = converted.map_err(|error| goes_on(error, path))?;
    if !options.dry_run && !is_vhd_name(path) {
        context
            .note(&format!("{}: its name does not say that it is a VHD now; --from vhd opens it, or rename it", path.display()));
    }
    let (from, to) = (converted.from, options.to.name());
    let verb = if options.dry_run { "would become" } else { "became" };
    let text = format!("{}: {from} {verb} {to}, {} of data moved\n", path.display(), sizes::show(converted.data));
    let document = Document {
        path: ShownPath(path),
        from,
        to,
        virtual_size: converted.size,
        data: converted.data,
        resumed: converted.resumed,
        done: !options.dry_run,
    };
    context.print(&text, &document)?;
    Ok(Answer::Yes)
}
