//! The least that a FUSE file over a raw file can be: the same library, threads and buffers as `vhd mount`, and nothing
//! between them and `pread` and `pwrite`. What the mount is compared with.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Result;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use vhd_core::storage::AlignedBuffer;

/// As `vhd mount` has it.
const MAX_TRANSFER: u32 = 1 << 20;
const TTL: Duration = Duration::from_secs(3600);
const O_DIRECT: i32 = 0o40000;
const FILE: INodeNo = INodeNo(2);

struct Floor {
    file: File,
    len: u64,
}

thread_local! {
    static BUFFER: RefCell<AlignedBuffer> = RefCell::new(AlignedBuffer::new(MAX_TRANSFER as usize));
}

/// Serves `file` as `folder/disk.raw` until it is unmounted.
pub fn serve(file: &Path, folder: &Path, threads: usize) -> Result<()> {
    let file = File::options().read(true).write(true).open(file)?;
    let len = file.metadata()?.len();
    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = true;
    config.mount_options = vec![MountOption::FSName("floor".into()), MountOption::CUSTOM(format!("max_read={MAX_TRANSFER}"))];
    Ok(fuser::mount(Floor { file, len }, folder, &config)?)
}

impl Floor {
    fn attributes(&self, number: INodeNo) -> FileAttr {
        let is_file = number == FILE;
        FileAttr {
            ino: number,
            size: if is_file { self.len } else { 0 },
            blocks: if is_file { self.len / 512 } else { 0 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { 0o644 } else { 0o755 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 128 << 10,
            flags: 0,
        }
    }
}

impl Filesystem for Floor {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let offered = config.capabilities();
        let _ = config.add_capabilities(wanted & offered);
        let _ = config.set_max_write(MAX_TRANSFER);
        let _ = config.set_max_background(64);
        let _ = config.set_max_readahead(MAX_TRANSFER).map_err(|most| config.set_max_readahead(most));
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk.raw" {
            reply.entry_with_ttls(&TTL, &TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(number));
    }

    fn open(&self, _request: &Request, _number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        let flags = if flags.0 & O_DIRECT == 0 { FopenFlags::FOPEN_KEEP_CACHE } else { direct };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let len = (size.min(MAX_TRANSFER) as u64).min(self.len.saturating_sub(offset)) as usize;
            match self.file.read_exact_at(&mut buffer[..len], offset) {
                Ok(()) => reply.data(&buffer[..len]),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file.write_all_at(data, offset) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn fsync(&self, _request: &Request, _number: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.file.sync_data() {
            Ok(()) => reply.ok(),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}
