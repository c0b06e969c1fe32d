"""
The native transfer engine: writes of many ranges straight into a peer's memory, then one signal. Knows addresses and bytes, not models. Every call that can wait releases the GIL.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['BackendInfo', 'Endpoint', 'Engine', 'EngineConfig', 'Event', 'EventKind', 'LocalMemory', 'Path', 'checksum', 'numa_node', 'probe_backends']
class EngineConfig:
    """
    Immutable settings of an Engine.
    """
    def __init__(self, *, backend: str = 'auto', bind_host: str = '127.0.0.1', devices: str = 'auto', gid_index: typing.SupportsInt | typing.SupportsIndex = -1, near: str = '', traffic_class: typing.SupportsInt | typing.SupportsIndex = 0, service_level: typing.SupportsInt | typing.SupportsIndex = 0, block_size: typing.SupportsInt | typing.SupportsIndex = 1048576, queue_depth: typing.SupportsInt | typing.SupportsIndex = 1024, qps_per_peer: typing.SupportsInt | typing.SupportsIndex = 2, peer_timeout_s: typing.SupportsFloat | typing.SupportsIndex = 5.0, connect_timeout_s: typing.SupportsFloat | typing.SupportsIndex = 15.0, spin_us: typing.SupportsInt | typing.SupportsIndex = -1, progress_cpu: typing.SupportsInt | typing.SupportsIndex = -1, link: str = '') -> None:
        """
        Raises ValueError naming the field that is out of range.
        """
    @property
    def backend(self) -> str:
        """
        'auto' (the best usable one), 'tcp', 'verbs' or 'cuda_ipc'.
        """
    @property
    def bind_host(self) -> str:
        """
        Address or name that peers reach this engine at; never a wildcard.
        """
    @property
    def block_size(self) -> int:
        """
        Bytes, 4 KiB to 8 MiB: longer runs are sliced into blocks of this size.
        """
    @property
    def connect_timeout_s(self) -> float:
        """
        Seconds from connect() until both sides must be ready.
        """
    @property
    def devices(self) -> str:
        """
        RDMA devices: 'auto', or names such as 'mlx5_0,mlx5_1:2' (device:port).
        """
    @property
    def gid_index(self) -> int:
        """
        GID table index of their ports; -1: RoCE v2 with an IPv4-mapped address first.
        """
    @property
    def link(self) -> str:
        """
        An emulated link to each peer, such as '25GB/s' or '12.5GB/s+5us' (rate and latency), for measurements: completions and signals wait until it would have carried the bytes. Empty: the hardware as it is.
        """
    @property
    def near(self) -> str:
        """
        Where the memory is, to choose devices by: 'numa:1', 'pci:0000:3b:00.0' (a GPU), or empty if it is not known.
        """
    @property
    def peer_timeout_s(self) -> float:
        """
        Seconds of silence after which a peer is lost; a heartbeat goes out every fifth of it.
        """
    @property
    def progress_cpu(self) -> int:
        """
        CPU that the progress thread is pinned to; -1: any near the device.
        """
    @property
    def qps_per_peer(self) -> int:
        """
        Data connections to each peer.
        """
    @property
    def queue_depth(self) -> int:
        """
        Slices per peer that may be posted and not yet acknowledged; further ones wait inside the engine.
        """
    @property
    def service_level(self) -> int:
        """
        InfiniBand service level, or RoCE priority.
        """
    @property
    def spin_us(self) -> int:
        """
        Microseconds that the progress thread polls after activity before it blocks; -1: the backend's own choice.
        """
    @property
    def traffic_class(self) -> int:
        """
        Traffic class of RoCE packets; their DSCP is its upper six bits.
        """
class EventKind:
    """
    What an Event reports.
    
    Members:
    
      CONNECTED
    
      TRANSFER_DONE
    
      TRANSFER_FAILED
    
      IMM
    
      MESSAGE
    
      PEER_LOST
    """
    CONNECTED: typing.ClassVar[EventKind]
    IMM: typing.ClassVar[EventKind]
    MESSAGE: typing.ClassVar[EventKind]
    PEER_LOST: typing.ClassVar[EventKind]
    TRANSFER_DONE: typing.ClassVar[EventKind]
    TRANSFER_FAILED: typing.ClassVar[EventKind]
    __members__: typing.ClassVar[dict[str, EventKind]]
    @typing.overload
    def __eq__(self, other: EventKind) -> bool:
        ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool:
        ...
    def __getstate__(self) -> int:
        ...
    def __hash__(self) -> int:
        ...
    def __index__(self) -> int:
        ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def __int__(self) -> int:
        ...
    @typing.overload
    def __ne__(self, other: EventKind) -> bool:
        ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def __str__(self) -> str:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def value(self) -> int:
        ...
class Event:
    """
    One thing that happened. Fields that the kind does not use are 0 or empty.
    
    CONNECTED: writes to the peer can land, and its own.
    TRANSFER_DONE: the bytes of write `id` are in the peer's memory.
    TRANSFER_FAILED: write `id` will not complete, for `reason`; any part of it may have landed.
    IMM: the peer's signal `imm`; all its earlier writes have landed here.
    MESSAGE: the peer's send() of `data`.
    PEER_LOST: fenced for `reason`; the last event of this peer.
    """
    def __repr__(self) -> str:
        ...
    @property
    def data(self) -> bytes:
        ...
    @property
    def id(self) -> int:
        ...
    @property
    def imm(self) -> int:
        ...
    @property
    def kind(self) -> EventKind:
        ...
    @property
    def peer(self) -> int:
        ...
    @property
    def posted_ns(self) -> int:
        """
        TRANSFER_DONE: when its last slice was posted, as time.monotonic_ns().
        """
    @property
    def reason(self) -> str:
        ...
    @property
    def time_ns(self) -> int:
        """
        When the engine saw it, as time.monotonic_ns().
        """
class BackendInfo:
    """
    Whether a backend can be used on this host.
    """
    def __repr__(self) -> str:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def reason(self) -> str:
        """
        What it uses, or what is missing.
        """
    @property
    def usable(self) -> bool:
        ...
class Path:
    """
    The way to a peer.
    """
    @property
    def backend(self) -> str:
        """
        'verbs', 'cuda_ipc' or 'tcp'.
        """
    @property
    def description(self) -> str:
        """
        For people.
        """
    @property
    def warning(self) -> str:
        """
        Why it is slower than the hardware allows and what to do; empty if it is not.
        """
class LocalMemory:
    """
    Registered memory; see Engine.register_memory().
    """
    def close(self) -> None:
        """
        Fence: when it returns nothing can land in the memory any more. Peers with a write half done into it, or outstanding out of it, are lost. Also done on collection.
        """
    @property
    def descriptor(self) -> bytes:
        """
        Bytes for the peers that shall write into this memory.
        """
    @property
    def nbytes(self) -> int:
        ...
    @property
    def ptr(self) -> int:
        ...
class Endpoint:
    """
    This side of one connection to be made.
    """
    @property
    def descriptor(self) -> bytes:
        """
        Bytes for exactly one peer's connect(); whoever holds them may connect.
        """
    @property
    def peer(self) -> int:
        """
        Names the peer in all calls and events.
        """
class Engine:
    """
    Writes into the memory of peers, and lets peers write into registered memory.
    
    One progress thread does the work; every method may be called from any thread. After close() all but poll(), wait() and close() raise RuntimeError.
    """
    def __init__(self, config: EngineConfig, incarnation: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Starts the progress thread and listens on config.bind_host.
        
        `incarnation` (u64, not 0) tells this engine from its predecessors. Raises ValueError for an unknown backend or incarnation 0, RuntimeError with the reason for a backend that is not usable here.
        """
    def cancel(self, peer: typing.SupportsInt | typing.SupportsIndex, ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        """
        Ends those of these writes of which nothing is posted yet, such as those that wait for a mark, in TRANSFER_FAILED at once and without their signals.
        
        The others end as they would. A peer that was closed is ignored.
        """
    def close(self) -> None:
        """
        Tells the peers, fences them, fails outstanding writes and joins the progress thread. Idempotent.
        """
    def close_peer(self, peer: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Fence: when it returns nothing of that peer can land, and its outstanding writes have their TRANSFER_FAILED. A peer already closed is ignored.
        """
    def connect(self, peer: typing.SupportsInt | typing.SupportsIndex, descriptor: bytes, memory: collections.abc.Sequence[bytes]) -> None:
        """
        Connects an endpoint to the peer's endpoint `descriptor`; `memory` lists descriptors of the peer's memory.
        
        Asynchronous, called by both sides at their own time; CONNECTED or PEER_LOST follows. Writes and signals queued meanwhile go out once connected. Raises ValueError naming what is wrong with a descriptor.
        """
    def create_endpoint(self, label: str) -> Endpoint:
        """
        One endpoint for one peer. `label`, such as 'decode-0/0', only names it in texts.
        """
    def mark(self, stream: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        A mark (> 0) behind all work that a CUDA stream was given by now.
        
        `stream` is the raw handle, as torch.cuda.current_stream().cuda_stream. Takes the stream one small memory operation. Raises RuntimeError without a GPU.
        """
    def peer_path(self, peer: typing.SupportsInt | typing.SupportsIndex) -> Path:
        """
        The way to a connected peer. Raises ValueError for a closed one, RuntimeError for one that is not connected.
        """
    def peer_stats(self, peer: typing.SupportsInt | typing.SupportsIndex) -> dict[str, int | float]:
        """
        Counters of one peer. Raises ValueError for a closed one.
        """
    def poll(self, max_events: typing.SupportsInt | typing.SupportsIndex = 256) -> list[Event]:
        """
        The oldest events, at most `max_events`, without blocking.
        """
    def reached(self, mark: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Whether the stream has come to the mark. No call of the driver.
        """
    def register_memory(self, ptr: typing.SupportsInt | typing.SupportsIndex, nbytes: typing.SupportsInt | typing.SupportsIndex, kind: str = 'host', peer_writable: bool = True) -> LocalMemory:
        """
        Makes [ptr, ptr + nbytes) a source of writes and, if `peer_writable`, a target of peers.
        
        `kind` is 'host' or 'cuda'. The caller keeps it mapped until LocalMemory.close(). May take seconds (pages are pinned). Raises ValueError for an empty range or a kind that the backend cannot reach, RuntimeError with call, errno and remedy.
        """
    def send(self, peer: typing.SupportsInt | typing.SupportsIndex, data: bytes) -> None:
        """
        Queues a message of at most 1 MiB. Messages keep their order among themselves and have none against writes and signals.
        """
    def signal(self, peer: typing.SupportsInt | typing.SupportsIndex, imm: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Queues an IMM event (u32) for the peer, delivered after every earlier write to it has landed. Signals keep their order.
        """
    def stats(self) -> dict[str, int | float]:
        """
        Counters since the start, and seconds spent posting.
        """
    def wait(self, timeout_s: typing.SupportsFloat | typing.SupportsIndex) -> bool:
        """
        True as soon as an event is queued, False after `timeout_s` seconds without one.
        """
    def write(self, peer: typing.SupportsInt | typing.SupportsIndex, src: numpy.typing.NDArray[numpy.int64], dst: numpy.typing.NDArray[numpy.int64], nbytes: numpy.typing.NDArray[numpy.int64], imm: typing.SupportsInt | typing.SupportsIndex | None = None, after: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
        """
        Queues one transfer of n ranges and returns its id (> 0).
        
        Three int64 arrays of shape (n,), C-contiguous: local addresses, addresses at the peer, bytes. Adjacent rows are joined, long runs sliced to block_size. Never blocks and never fails for want of room; ends in exactly one TRANSFER_DONE or TRANSFER_FAILED, until when the source bytes must not change. They are read once the mark `after` is reached. Raises ValueError naming the first row outside registered memory, RuntimeError when the peer is lost or connect() was not called.
        """
    @property
    def backend(self) -> str:
        ...
    @property
    def description(self) -> str:
        """
        What the backend uses and why, for people: devices, ports, GIDs.
        """
    @property
    def incarnation(self) -> int:
        ...
def checksum(addresses: numpy.typing.NDArray[numpy.int64], nbytes: numpy.typing.NDArray[numpy.int64], kind: str = 'host') -> numpy.typing.NDArray[numpy.uint64]:
    """
    XXH64 (seed 0) of each range of this process's memory, which is 'host' or 'cuda'.
    
    Two int64 arrays of shape (n,): addresses and bytes; returns uint64 of shape (n,). The memory must be mapped: host addresses are not checked. GPU memory is read without waiting for any stream. Raises RuntimeError with the driver's error.
    """
def numa_node(address: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    NUMA node of the page at `address`; -1 if it was never touched or none is known.
    """
def probe_backends() -> list[BackendInfo]:
    """
    What this host offers to each backend, best first.
    """
