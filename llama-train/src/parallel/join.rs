//! How the members of a group find each other.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use llama_data::loader::Rank;
use serde::{Deserialize, Serialize};

use super::Group;
use super::link::{LANES, Link, Links};
use crate::TrainError;

/// Version of what is said over TCP.
const VERSION: u32 = 2;
/// How long a process may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// Where the processes of a run meet. All of them must trust the network between them: nothing is encrypted.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    /// Host and port on which the first process listens, as the others reach it.
    pub address: String,
    /// Which process this is, from 0.
    pub node: usize,
    /// How many there are.
    pub nodes: usize,
    /// How long to wait for the others, at the beginning and at each exchange.
    pub timeout: Duration,
}

impl Rendezvous {
    /// A process that waits for the others for half an hour: a member that writes a large checkpoint takes its time.
    pub fn new(address: impl Into<String>, node: usize, nodes: usize) -> Self {
        Self { address: address.into(), node, nodes, timeout: WAIT }
    }

    fn error(&self, reason: impl ToString) -> TrainError {
        TrainError::Rendezvous { address: self.address.clone(), reason: reason.to_string() }
    }
}

const WAIT: Duration = Duration::from_secs(1800);

/// What a process says to the first.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: u32,
    node: usize,
    nodes: usize,
    devices: usize,
    /// Where it listens.
    port: u16,
}

/// What the first process answers.
#[derive(Serialize, Deserialize)]
enum Answer {
    Welcome(Table),
    Refused(String),
}

/// All processes.
#[derive(Clone, Serialize, Deserialize)]
struct Table {
    /// Said on each connection, so that others are not taken for members.
    token: u64,
    nodes: Vec<Node>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Node {
    address: SocketAddr,
    devices: usize,
}

/// Makes the members of this process, one for each of its devices, and connects them with those of the others. Ranks count through
/// processes and their devices in order.
///
/// # Errors
/// [`TrainError::Rendezvous`] if the others do not come in time, or do not go with this one.
pub fn join(devices: usize, rendezvous: Option<&Rendezvous>) -> Result<Vec<Group>, TrainError> {
    let Some(rendezvous) = rendezvous.filter(|rendezvous| rendezvous.nodes > 1) else {
        return Ok(into_groups(local(devices, 0, devices, WAIT), 0));
    };
    let deadline = Instant::now() + rendezvous.timeout;
    let meeting = match rendezvous.node {
        0 => host(rendezvous, devices, deadline),
        node if node < rendezvous.nodes => call(rendezvous, devices, deadline),
        node => return Err(rendezvous.error(format!("this is process {node}, from 0, of {}", rendezvous.nodes))),
    };
    let (listener, Table { token, nodes }) = meeting.map_err(|error| rendezvous.error(error))?;
    let first = |node: usize| nodes[..node].iter().map(|node| node.devices).sum::<usize>();
    let (from, count) = (first(rendezvous.node), first(nodes.len()));
    let mut links = local(devices, from, count, rendezvous.timeout);
    // A process connects to all members of those before it, and waits for those after it.
    let connect = |links: &mut Vec<ByRank>| {
        for (node, Node { address, devices: theirs }) in nodes[..rendezvous.node].iter().enumerate() {
            for (index, rank) in (0..devices).flat_map(|index| (0..*theirs).map(move |rank| (index, rank))) {
                let rank = first(node) + rank;
                for (lane, link) in links[index][rank].iter_mut().enumerate() {
                    let mut stream = TcpStream::connect_timeout(address, INTRODUCTION)?;
                    stream.write_all(&Opening { token, from: from + index, to: rank, lane }.to_bytes())?;
                    *link = Some(Link::tcp(stream, rendezvous.timeout)?);
                }
            }
        }
        // A device has no links to itself.
        while links.iter().flatten().flatten().filter(|link| link.is_none()).count() > devices * LANES {
            let mut stream = accept(&listener, deadline)?;
            let mut bytes = [0; Opening::LEN];
            if stream.read_exact(&mut bytes).is_err() {
                continue;
            }
            let Opening { token: said, from: rank, to, lane } = Opening::from_bytes(bytes);
            let link = to.checked_sub(from).and_then(|index| links.get_mut(index)?.get_mut(rank)?.get_mut(lane));
            if let Some(link) = link.filter(|link| said == token && link.is_none() && rank != to) {
                *link = Some(Link::tcp(stream, rendezvous.timeout)?);
            }
        }
        Ok::<_, io::Error>(())
    };
    connect(&mut links).map_err(|error| rendezvous.error(error))?;
    Ok(into_groups(links, from))
}

/// The links of a device by rank and lane.
type ByRank = Vec<[Option<Link>; LANES]>;

/// For each device of this process its links, those to the other devices of this process made.
fn local(devices: usize, from: usize, count: usize, timeout: Duration) -> Vec<ByRank> {
    let mut links: Vec<ByRank> = (0..devices).map(|_| (0..count).map(|_| [const { None }; LANES]).collect()).collect();
    for (a, b) in (0..devices).flat_map(|a| (0..a).map(move |b| (a, b))) {
        for (lane, (ours, theirs)) in std::iter::repeat_with(|| Link::pair(timeout)).take(LANES).enumerate() {
            (links[a][from + b][lane], links[b][from + a][lane]) = (Some(ours), Some(theirs));
        }
    }
    links
}

fn into_groups(links: Vec<ByRank>, from: usize) -> Vec<Group> {
    let group = |(index, links): (usize, ByRank)| {
        let rank = Rank { index: (from + index) as u64, count: links.len() as u64 };
        let (step, background) = links.into_iter().map(|[step, background]| (step, background)).unzip();
        Group::new(rank, Links::new(step), Links::new(background))
    };
    links.into_iter().enumerate().map(group).collect()
}

/// The first process: hears the others, then tells each of all.
fn host(rendezvous: &Rendezvous, devices: usize, deadline: Instant) -> io::Result<(TcpListener, Table)> {
    let listener = TcpListener::bind(&rendezvous.address)?;
    let mut others: Vec<Option<(Node, TcpStream)>> = (1..rendezvous.nodes).map(|_| None).collect();
    while let Some(missing) = others.iter().position(Option::is_none) {
        let late =
            |error: io::Error| io::Error::new(error.kind(), format!("{error}; process {} is missing", missing + 1));
        let mut stream = accept(&listener, deadline).map_err(late)?;
        // Whoever says something else is not of the run.
        let Ok(hello) = hear::<Hello>(&stream) else { continue };
        let place = hello.node.checked_sub(1).and_then(|place| others.get_mut(place));
        let refused = match place {
            _ if hello.version != VERSION => format!("this is version {VERSION}, that {}", hello.version),
            _ if hello.nodes != rendezvous.nodes => {
                format!("here are {} processes, there {}", rendezvous.nodes, hello.nodes)
            }
            Some(place @ None) => {
                let address = SocketAddr::new(stream.peer_addr()?.ip(), hello.port);
                *place = Some((Node { address, devices: hello.devices }, stream));
                continue;
            }
            _ => format!("there are two processes {}", hello.node),
        };
        say(&mut stream, &Answer::Refused(refused.clone()))?;
        return Err(io::Error::other(refused));
    }
    let (nodes, streams): (Vec<Node>, Vec<TcpStream>) = others.into_iter().flatten().unzip();
    let own = Node { address: listener.local_addr()?, devices };
    let token = RandomState::new().build_hasher().finish();
    let table = Table { token, nodes: std::iter::once(own).chain(nodes).collect() };
    for mut stream in streams {
        say(&mut stream, &Answer::Welcome(table.clone()))?;
    }
    Ok((listener, table))
}

/// Another process: says who it is to the first, and hears of all.
fn call(rendezvous: &Rendezvous, devices: usize, deadline: Instant) -> io::Result<(TcpListener, Table)> {
    let mut stream = loop {
        match TcpStream::connect(&rendezvous.address) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error),
            // The first process may start later.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    };
    let listener = TcpListener::bind((stream.local_addr()?.ip(), 0))?;
    let Rendezvous { node, nodes, .. } = *rendezvous;
    say(&mut stream, &Hello { version: VERSION, node, nodes, devices, port: listener.local_addr()?.port() })?;
    stream.set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(INTRODUCTION)))?;
    match hear(&stream)? {
        Answer::Welcome(table) if table.nodes.len() != nodes => {
            Err(io::Error::other(format!("it knows {} processes, not {nodes}", table.nodes.len())))
        }
        Answer::Welcome(mut table) => {
            // As it was reached from here.
            table.nodes[0].address = stream.peer_addr()?;
            Ok((listener, table))
        }
        Answer::Refused(reason) => Err(io::Error::other(reason)),
    }
}

/// A connection that has a moment to say who it is.
fn accept(listener: &TcpListener, deadline: Instant) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(INTRODUCTION))?;
                return Ok(stream);
            }
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if Instant::now() > deadline => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the other processes did not come in time"));
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn say(stream: &mut TcpStream, what: &impl Serialize) -> io::Result<()> {
    let line = serde_json::to_string(what).map_err(io::Error::other)? + "\n";
    stream.write_all(line.as_bytes())
}

fn hear<T: for<'de> Deserialize<'de>>(stream: &TcpStream) -> io::Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(1 << 20)).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(io::Error::other)
}

/// The first bytes of a connection between two members.
struct Opening {
    token: u64,
    from: usize,
    to: usize,
    lane: usize,
}

impl Opening {
    const LEN: usize = 20;

    fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.token.to_le_bytes());
        for (place, number) in [self.from, self.to, self.lane].into_iter().enumerate() {
            bytes[8 + 4 * place..][..4].copy_from_slice(&(number as u32).to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let number =
            |place: usize| u32::from_le_bytes(std::array::from_fn(|index| bytes[8 + 4 * place + index])) as usize;
        let token = u64::from_le_bytes(std::array::from_fn(|index| bytes[index]));
        Self { token, from: number(0), to: number(1), lane: number(2) }
    }
}
