//! A connection between two members: channels; between processes, two threads carry them over TCP. And those of a member to all others.

use std::io::{self, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::TrainError;

/// Frames that may wait for the other end, in each direction.
const AHEAD: usize = 4;
/// The longest frame; what claims to be longer is none.
const LONGEST: u64 = 1 << 36;

/// Connections between any two members: one for what a step waits for, one for what goes on in the background, so that each has its own order.
pub(super) const LANES: usize = 2;

/// What is sent at a time. Over TCP: a byte for the kind, the length in bytes as a u64, then the content, in little endian.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    Bytes(Vec<u8>),
    /// A flat tensor.
    Floats(Vec<f32>),
}

/// A frame, or why there will be no more.
pub(super) type Sent = Result<Frame, String>;

/// One end of a connection.
pub(super) struct Link {
    /// There until dropped.
    to: Option<SyncSender<Sent>>,
    /// Only one thread receives at a time; the lock lets a model, which others may hold, have the link.
    from: Mutex<Receiver<Sent>>,
    timeout: Duration,
    writer: Option<JoinHandle<()>>,
}

impl Link {
    /// Both ends of a connection inside this process.
    pub fn pair(timeout: Duration) -> (Self, Self) {
        let (to_b, from_a) = sync_channel(AHEAD);
        let (to_a, from_b) = sync_channel(AHEAD);
        let end = |to, from| Self { to: Some(to), from: Mutex::new(from), timeout, writer: None };
        (end(to_b, from_b), end(to_a, from_a))
    }

    /// This end of a connection to another process.
    pub fn tcp(stream: TcpStream, timeout: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(timeout))?;
        let (to, outgoing) = sync_channel::<Sent>(AHEAD);
        let (incoming, from) = sync_channel(AHEAD);
        let mut reader = stream.try_clone()?;
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        spawn("group-read").spawn(move || {
            loop {
                let sent = read(&mut reader).map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => LEFT.into(),
                    _ => error.to_string(),
                });
                let ended = sent.is_err();
                if incoming.send(sent).is_err() || ended {
                    break;
                }
            }
        })?;
        let writer = spawn("group-write").spawn(move || {
            let mut out = BufWriter::new(&stream);
            for frame in outgoing.into_iter().flatten() {
                if write(&mut out, &frame).is_err() {
                    break;
                }
            }
            drop(out);
            // Ends the other thread, too.
            let _ = stream.shutdown(Shutdown::Both);
        })?;
        Ok(Self { to: Some(to), from: Mutex::new(from), timeout, writer: Some(writer) })
    }

    /// Sends a frame, perhaps after waiting for those before it.
    pub fn send(&self, frame: Frame) -> Result<(), String> {
        let to = self.to.as_ref().expect("there until dropped");
        // The end that has left may have said why.
        to.send(Ok(frame)).map_err(|_| self.from().try_iter().find_map(Sent::err).unwrap_or_else(|| LEFT.into()))
    }

    fn from(&self) -> MutexGuard<'_, Receiver<Sent>> {
        self.from.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next frame of the other end, however long it takes.
    pub fn wait(&self) -> Sent {
        self.from().recv().unwrap_or_else(|_| Err(LEFT.into()))
    }

    /// The next frame of the other end.
    pub fn receive(&self) -> Sent {
        self.from().recv_timeout(self.timeout).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => format!("nothing came from it for {} s", self.timeout.as_secs()),
                RecvTimeoutError::Disconnected => LEFT.into(),
            })
        })
    }
}

const LEFT: &str = "it left; what it printed says why. A run goes on from its newest checkpoint";

impl Drop for Link {
    /// Waits until all is sent.
    fn drop(&mut self) {
        self.to = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// The connections of a member to the others, by rank; none to itself.
pub(super) struct Links(Vec<Option<Link>>);

impl Links {
    pub fn new(by_rank: Vec<Option<Link>>) -> Self {
        Self(by_rank)
    }

    /// All ranks, this member's included.
    pub fn ranks(&self) -> Range<usize> {
        0..self.0.len()
    }

    pub fn to(&self, rank: usize) -> &Link {
        self.0[rank].as_ref().expect("a member sends nothing to itself")
    }

    pub fn send(&self, rank: usize, frame: Frame) -> Result<(), TrainError> {
        self.to(rank).send(frame).map_err(|reason| TrainError::Member { rank, reason })
    }

    pub fn receive(&self, rank: usize) -> Result<Frame, TrainError> {
        self.to(rank).receive().map_err(|reason| TrainError::Member { rank, reason })
    }

    pub fn receive_bytes(&self, rank: usize) -> Result<Vec<u8>, TrainError> {
        match self.receive(rank)? {
            Frame::Bytes(bytes) => Ok(bytes),
            Frame::Floats(_) => Err(out_of_step(rank)),
        }
    }

    /// `len` numbers from a member.
    pub fn receive_floats(&self, rank: usize, len: usize) -> Result<Vec<f32>, TrainError> {
        match self.receive(rank)? {
            Frame::Floats(floats) if floats.len() == len => Ok(floats),
            _ => Err(out_of_step(rank)),
        }
    }
}

pub(super) fn out_of_step(rank: usize) -> TrainError {
    TrainError::Member { rank, reason: "it sent something else than was its turn; is it another version?".into() }
}

fn write(out: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let (kind, content): (u8, &[u8]) = match frame {
        Frame::Bytes(bytes) => (0, bytes),
        Frame::Floats(floats) => (1, bytemuck::cast_slice(floats)),
    };
    out.write_all(&[kind])?;
    out.write_all(&(content.len() as u64).to_le_bytes())?;
    out.write_all(content)?;
    out.flush()
}

fn read(from: &mut impl Read) -> io::Result<Frame> {
    let (mut kind, mut len) = ([0], [0; 8]);
    from.read_exact(&mut kind)?;
    from.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    match kind[0] {
        0 if len <= LONGEST => {
            let mut bytes = vec![0; len as usize];
            from.read_exact(&mut bytes)?;
            Ok(Frame::Bytes(bytes))
        }
        1 if len <= LONGEST && len.is_multiple_of(4) => {
            let mut floats = vec![0.0f32; len as usize / 4];
            from.read_exact(bytemuck::cast_slice_mut(&mut floats))?;
            Ok(Frame::Floats(floats))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "what came from it is no frame")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_what_is_none_is_refused() {
        for frame in [Frame::Bytes(vec![]), Frame::Bytes(vec![1, 2, 3]), Frame::Floats(vec![1.5, f32::NEG_INFINITY])] {
            let mut bytes = Vec::new();
            write(&mut bytes, &frame).unwrap();
            assert_eq!(read(&mut &bytes[..]).unwrap(), frame);
            for cut in 0..bytes.len() {
                assert_eq!(read(&mut &bytes[..cut]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            }
        }
        for bytes in [[2, 0, 0, 0, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 255]] {
            assert_eq!(read(&mut &bytes[..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn an_end_that_is_dropped_sends_what_it_has_and_is_missed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        let tcp = |stream| Link::tcp(stream, Duration::from_secs(20)).unwrap();
        for (a, b) in [Link::pair(Duration::from_secs(20)), (tcp(near), tcp(far))] {
            let floats: Vec<f32> = (0..1_000_000).map(|n| n as f32).collect();
            a.send(Frame::Floats(floats.clone())).unwrap();
            a.send(Frame::Bytes(vec![7])).unwrap();
            drop(a);
            assert_eq!(b.receive(), Ok(Frame::Floats(floats)));
            assert_eq!(b.receive(), Ok(Frame::Bytes(vec![7])));
            assert!(b.receive().unwrap_err().contains("it left"));
        }
        let (a, _b) = Link::pair(Duration::from_millis(1));
        assert!(a.receive().unwrap_err().contains("nothing came"));
    }
}
