//! Answers to the kernel.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::libc;

use crate::buffer;
use crate::document::Document;
use crate::gate::{Gate, Pass};
use crate::opens::Opens;
use crate::options::MountOptions;
use crate::server;
use crate::tree::{Content, Node, Tree};
use crate::view::View;

/// The most that is read or written at once: what a kernel allows where nobody raised fs.fuse.max_pages_limit.
pub(crate) const MAX_TRANSFER: u32 = 1 << 20;

/// Requests that the kernel sends ahead of being waited for: readahead, and direct I/O in parts.
const MAX_BACKGROUND: u16 = 64;

/// Names never change.
const NAME_TTL: Duration = Duration::from_secs(3600);

/// Sizes never change either, but allocation and times do.
const ATTR_TTL: Duration = Duration::from_secs(1);

/// Unit of `statfs`.
const BLOCK_SIZE: u32 = 4096;

/// Texts that are open at once: each is a descriptor of this process, and room on the host's volume.
const MAX_TEXTS: usize = 32;

/// Bytes that programs are told to read and write at once: many, because each request has its price.
const PREFERRED_IO: u32 = 128 << 10;

/// A tree of files, served.
pub(crate) struct DiskFiles {
    tree: Tree,
    gate: Arc<Gate>,
    options: MountOptions,
    uid: u32,
    gid: u32,
    identity: String,
    /// Texts that are open, by handle; nothing while one is being made.
    texts: Mutex<HashMap<u64, Option<Arc<File>>>>,
    /// The handle of the next text. Other files need none: theirs is 0.
    next_handle: AtomicU64,
    opens: Opens,
    /// The kernel keeps cached pages right when others go past them (since Linux 6.6).
    coherent_direct_io: bool,
}

impl DiskFiles {
    /// Serves `tree` for as long as `gate` is open.
    pub(crate) fn new(tree: Tree, gate: Arc<Gate>, options: MountOptions) -> io::Result<Self> {
        Ok(Self {
            uid: options.uid.unwrap_or_else(|| nix::unistd::geteuid().as_raw()),
            gid: options.gid.unwrap_or_else(|| nix::unistd::getegid().as_raw()),
            identity: server::identity()?,
            tree,
            gate,
            options,
            texts: Mutex::default(),
            next_handle: AtomicU64::new(1),
            opens: Opens::default(),
            coherent_direct_io: false,
        })
    }

    /// A file, and the right to use its disk.
    fn file(&self, number: INodeNo) -> Result<(Pass<'_>, &View), Errno> {
        let pass = self.gate.enter().ok_or(Errno::ENOTCONN)?;
        match self.node(number)?.content {
            Content::File(ref view) => Ok((pass, view)),
            Content::Folder => Err(Errno::EISDIR),
            Content::Document(_) => Err(Errno::EINVAL),
        }
    }

    fn node(&self, number: INodeNo) -> Result<&Node, Errno> {
        self.tree.get(number).ok_or(Errno::ENOENT)
    }

    fn attributes(&self, number: INodeNo) -> Result<FileAttr, Errno> {
        let node = self.node(number)?;
        let (kind, perm, size, allocated, modified) = match &node.content {
            Content::Folder => (FileType::Directory, self.options.folder_mode(), 0, 0, None),
            Content::File(view) => {
                // The map is the disk's: not looked at once the disk is closed.
                let allocated = self.gate.enter().map_or(view.len(), |_pass| view.allocated());
                let mode = self.options.file_mode(view.read_only());
                (FileType::RegularFile, mode, view.len(), allocated, Some(view.modified()))
            }
            Content::Document(text) => (FileType::RegularFile, self.options.file_mode(true), text.len(), 0, None),
        };
        // Others change when the mount does: never.
        let time = modified.or_else(|| self.tree.files().next().map(View::modified));
        let time = time.unwrap_or(std::time::UNIX_EPOCH);
        Ok(FileAttr {
            ino: number,
            size,
            blocks: allocated.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: PREFERRED_IO,
            flags: 0,
        })
    }

    fn open_file(&self, number: INodeNo, flags: OpenFlags) -> Result<(FileHandle, FopenFlags), Errno> {
        let writing = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if let Content::Document(text) = &self.node(number)?.content {
            return if writing { Err(Errno::EROFS) } else { self.open_text(text) };
        }
        let (_pass, view) = self.file(number)?;
        if writing && view.read_only() {
            return Err(Errno::EROFS);
        }
        // Nobody else changes the disk while it is mounted, so what is cached stays true until another view is written.
        let mut answer = FopenFlags::empty();
        answer.set(FopenFlags::FOPEN_KEEP_CACHE, view.cache_is_current());
        if flags.0 & libc::O_DIRECT != 0 && self.coherent_direct_io {
            // O_DIRECT works without this too, but then the kernel lets only one write in at a time.
            answer |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        }
        Ok((FileHandle(0), answer))
    }

    fn open_text(&self, text: &Document) -> Result<(FileHandle, FopenFlags), Errno> {
        let _pass = self.gate.enter().ok_or(Errno::ENOTCONN)?;
        // Its place is taken before it is made, which may take long.
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        {
            let mut texts = self.texts();
            if texts.len() >= MAX_TEXTS {
                return Err(Errno::ENFILE);
            }
            texts.insert(handle, None);
        }
        let made = text.open().map_err(|error| {
            tracing::error!("{error}");
            Errno::EIO
        });
        match made {
            Ok(file) => drop(self.texts().insert(handle, Some(Arc::new(file)))),
            Err(error) => {
                self.texts().remove(&handle);
                return Err(error);
            }
        }
        // Read as far as it goes, whatever size the kernel knows.
        Ok((FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO))
    }

    fn read_text(&self, handle: FileHandle, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let file = self.texts().get(&handle.0).cloned().flatten().ok_or(Errno::EBADF)?;
        file.read_at(buf, offset).map_err(Errno::from)
    }

    fn texts(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Option<Arc<File>>>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What may be set: nothing but times, and what already is so.
    fn check_change(&self, number: INodeNo, change: &Change) -> Result<FileAttr, Errno> {
        let now = self.attributes(number)?;
        match change.size {
            // An open with O_TRUNC, which a block device takes too, and cuts nothing off.
            Some(0) if change.by_open && now.kind == FileType::RegularFile => {}
            Some(size) if now.kind == FileType::Directory || size < now.size => return Err(Errno::EPERM),
            Some(size) if size > now.size => return Err(Errno::EFBIG),
            _ => {}
        }
        let same = change.mode.is_none_or(|mode| mode & 0o7777 == u32::from(now.perm))
            && change.uid.is_none_or(|uid| uid == now.uid)
            && change.gid.is_none_or(|gid| gid == now.gid);
        if same { Ok(now) } else { Err(Errno::EPERM) }
    }

    fn entries(&self, number: INodeNo) -> Result<Vec<(INodeNo, FileType, &OsStr)>, Errno> {
        let node = self.node(number)?;
        let Content::Folder = node.content else { return Err(Errno::ENOTDIR) };
        let own = [(number, FileType::Directory, OsStr::new(".")), (node.parent, FileType::Directory, OsStr::new(".."))];
        let children = self.tree.children(number).map(|(child, node)| {
            let kind = match node.content {
                Content::Folder => FileType::Directory,
                Content::File(_) | Content::Document(_) => FileType::RegularFile,
            };
            (child, kind, node.name.as_os_str())
        });
        Ok(own.into_iter().chain(children).collect())
    }
}

/// The parts of `setattr` that matter here.
struct Change {
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    /// An open with O_TRUNC.
    by_open: bool,
}

/// Sends what a request came to. (The reply types of fuser have no trait in common.)
macro_rules! answer {
    ($reply:ident, $result:expr, $good:pat => $send:expr) => {
        match $result {
            Ok($good) => $send,
            Err(error) => $reply.error(error),
        }
    };
}

impl Filesystem for DiskFiles {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            // Without it the kernel asks for an attribute before each write, to see whether to take rights away.
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let offered = config.capabilities();
        self.coherent_direct_io = offered.contains(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        let refused = |what: &str| io::Error::other(format!("fuser refused {what}"));
        config.add_capabilities(wanted & offered).map_err(|_| refused("capabilities that the kernel has"))?;
        config.set_max_write(MAX_TRANSFER).map_err(|_| refused("max_write"))?;
        config.set_max_background(MAX_BACKGROUND).map_err(|_| refused("max_background"))?;
        // As much as the kernel allows, which is 128 KiB unless root raises it afterwards.
        let _ = config.set_max_readahead(MAX_TRANSFER).map_err(|most| config.set_max_readahead(most));
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.tree.lookup(parent, name).ok_or(Errno::ENOENT);
        answer!(reply, found.and_then(|number| self.attributes(number)), attr => {
            reply.entry_with_ttls(&ATTR_TTL, &NAME_TTL, &attr, Generation(0));
        });
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.attributes(number), attr => reply.attr(&ATTR_TTL, &attr));
    }

    fn setattr(
        &self,
        request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // ftruncate(2) names the file that was opened.
        let by_open = size == Some(0) && handle.is_none() && self.opens.was_last(request.pid(), number);
        let change = Change { mode, uid, gid, size, by_open };
        answer!(reply, self.check_change(number, &change), attr => reply.attr(&ATTR_TTL, &attr));
    }

    fn open(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.opens.note(request.pid(), number);
        answer!(reply, self.open_file(number, flags), (handle, flags) => reply.opened(handle, flags));
    }

    fn release(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if handle.0 != 0 {
            self.texts().remove(&handle.0);
        }
        reply.ok();
    }

    fn read(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.opens.forget(request.pid());
        let len = size.min(MAX_TRANSFER) as usize;
        buffer::with(len, |buf| {
            let done = match handle.0 {
                0 => self.file(number).and_then(|(_pass, view)| view.read(buf, offset)),
                _ => self.read_text(handle, buf, offset),
            };
            answer!(reply, done, len => reply.data(&buf[..len]));
        });
    }

    fn write(
        &self,
        request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.opens.forget(request.pid());
        let done = self.file(number).and_then(|(_pass, view)| view.write(data, offset));
        // A request has no more than MAX_TRANSFER bytes.
        answer!(reply, done, len => reply.written(u32::try_from(len).unwrap_or(u32::MAX)));
    }

    fn flush(&self, _request: &Request, _number: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // Nothing is to be done when a file is closed; after this answer the kernel doesn't ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _request: &Request, number: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        answer!(reply, self.file(number).and_then(|(_pass, view)| view.flush()), () => reply.ok());
    }

    fn fsyncdir(&self, _request: &Request, _number: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.file(number).and_then(|(_pass, view)| view.allocate(offset, length, mode));
        answer!(reply, done, () => reply.ok());
    }

    fn lseek(&self, _request: &Request, number: INodeNo, _handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let found = self.file(number).and_then(|(_pass, view)| view.seek(offset, whence));
        answer!(reply, found, offset => reply.offset(offset));
    }

    fn readdir(&self, _request: &Request, number: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        answer!(reply, self.entries(number), entries => {
            let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
            for (index, (number, kind, name)) in entries.into_iter().enumerate().skip(skipped) {
                // The offset is that of the next entry. True is "full".
                if reply.add(number, index as u64 + 1, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn statfs(&self, _request: &Request, _number: INodeNo, reply: ReplyStatfs) {
        let unit = u64::from(BLOCK_SIZE);
        let largest = self.tree.files().max_by_key(|view| view.len());
        let (size, allocated) = match (largest, self.gate.enter()) {
            (Some(view), Some(_pass)) => (view.len(), view.allocated()),
            _ => (0, 0),
        };
        let (blocks, free) = (size.div_ceil(unit), (size - allocated) / unit);
        reply.statfs(blocks, free, free, self.tree.len() as u64, 0, BLOCK_SIZE, 255, BLOCK_SIZE);
    }

    fn getxattr(&self, _request: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if number != INodeNo::ROOT || name != server::ATTRIBUTE {
            return reply.error(Errno::NO_XATTR);
        }
        let value = self.identity.as_bytes();
        match u32::try_from(value.len()) {
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if size >= len => reply.data(value),
            _ => reply.error(Errno::ERANGE),
        }
    }

    fn listxattr(&self, _request: &Request, _number: INodeNo, size: u32, reply: ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }

    // The tree is what it is. Without these, the kernel would say "function not implemented".

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn access(&self, _request: &Request, _number: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks, by owner and mode; after this answer it doesn't ask again.
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _data: &[u8],
        _answer_size: u32,
        reply: ReplyIoctl,
    ) {
        // What files of a disk have none of, such as the size as block devices tell it.
        reply.error(Errno::ENOTTY);
    }
}
