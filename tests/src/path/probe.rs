//! Is the path what it claims to be? A UDP and a TCP probe from host to host, before anything is measured over it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::namespace;
use crate::rig::Rig;

use super::PathSpec;

/// Round trips measured.
const PINGS: usize = 100;
/// Packets whose loss is counted, when the path loses any.
const LOSS_PACKETS: u32 = 40_000;
/// Payload of a packet whose loss is counted, and of one that measures the rate.
const SMALL: usize = 64;
const FULL: usize = 1400;
/// IP and UDP headers.
const HEADERS: usize = 28;
/// How long the rate is measured.
const RATE_TIME: Duration = Duration::from_millis(600);
/// Slower than any path measured, so a burst of small packets fills no queue.
const PAUSE_EVERY: u32 = 20;
const PAUSE: Duration = Duration::from_millis(1);
/// How long a first packet may take on a busy machine.
const FIRST: Duration = Duration::from_secs(5);
/// A path is believed when the median round trip is over by no more than this, for waking threads takes time.
const RTT_SLACK: Duration = Duration::from_millis(1);
/// ... and the rate is off by no more than this part.
const RATE_SLACK: f64 = 0.06;
/// Where neither distance nor loss holds it back, one TCP connection is to reach this part of the rate.
const TCP_PART: f64 = 0.7;
/// A round trip that does not hold one connection back while the rate is measured.
const SHORT: Duration = Duration::from_millis(2);
/// ... and the loss by no more than this many standard deviations.
const LOSS_SIGMAS: f64 = 4.5;

/// What the probes found.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Measured {
    /// Median round trip of a small UDP packet.
    pub rtt_us: u64,
    /// The 99th percentile.
    pub rtt_p99_us: u64,
    /// Part of small UDP packets, sent slowly, that did not arrive.
    pub loss: f64,
    /// Megabits per second of IP that arrive when more is sent, if the path has a rate.
    pub udp_mbit_s: Option<f64>,
    /// Megabits per second one TCP connection of the kernel's default kind moves; bounded by loss and round trip.
    pub tcp_mbit_s: f64,
}

/// Measures the path between the hosts of `rig`, which was made to be like `spec`; fails when it is not.
pub fn check(rig: &Rig, spec: &PathSpec) -> Result<Measured> {
    let ends = Ends {
        source: rig.source.namespace().to_owned(),
        destination: rig.destination.namespace().to_owned(),
        address: rig.destination.address(),
    };
    let mut trips = ends.round_trips(spec)?;
    trips.sort_unstable();
    let measured = Measured {
        rtt_us: micros(trips[trips.len() / 2]),
        rtt_p99_us: micros(trips[trips.len() * 99 / 100]),
        loss: if spec.loss > 0.0 {
            ends.loss(spec)?
        } else {
            0.0
        },
        udp_mbit_s: spec.rate.map(|rate| ends.rate(spec, rate)).transpose()?,
        tcp_mbit_s: ends.tcp_rate()?,
    };
    measured
        .agrees_with(spec)
        .with_context(|| format!("the path {spec} is not what it claims: {measured:?}"))?;
    Ok(measured)
}

impl Measured {
    fn agrees_with(&self, spec: &PathSpec) -> Result<()> {
        let wanted = spec.rtt + spec.jitter;
        let rtt = Duration::from_micros(self.rtt_us);
        ensure!(rtt >= spec.rtt, "the round trip is too short");
        ensure!(rtt <= wanted + RTT_SLACK, "the round trip is too long");
        let deviation = (spec.loss * (1.0 - spec.loss) / f64::from(LOSS_PACKETS)).sqrt();
        let off = (self.loss - spec.loss).abs();
        ensure!(off <= LOSS_SIGMAS * deviation, "the loss is off by {off}");
        if let (Some(rate), Some(measured)) = (spec.rate, self.udp_mbit_s) {
            // On the way, loss takes its part of the rate.
            let ratio = measured * 1e6 / (rate as f64 * (1.0 - spec.loss));
            ensure!(
                ratio <= 1.0 + RATE_SLACK,
                "it carries {ratio:.2} of its rate"
            );
            // What fills the bucket, and is sent before the clock of the other end runs, comes on top of the rate.
            let free = super::bucket_bytes(rate) as f64 * 8.0 / RATE_TIME.as_secs_f64();
            let most = rate as f64 * (1.0 + RATE_SLACK) + free;
            ensure!(
                self.tcp_mbit_s * 1e6 <= most,
                "TCP moves {:.0} Mbit/s over it",
                self.tcp_mbit_s
            );
        }
        Ok(())
    }

    /// In which ways the path is less than it claims, for the reports on what was measured over it.
    pub fn caveats(&self, spec: &PathSpec) -> Vec<String> {
        let Some(rate) = spec.rate.map(|rate| rate as f64 / 1e6) else {
            return Vec::new();
        };
        let mut caveats = Vec::new();
        // A program that sends one packet after the other may be slower than the kernel's TCP.
        let carried = self.tcp_mbit_s.max(self.udp_mbit_s.unwrap_or(0.0));
        if carried < rate * (1.0 - spec.loss) * (1.0 - RATE_SLACK) {
            caveats.push(format!("carried {carried:.0} of {rate:.0} Mbit/s"));
        }
        let unhindered = spec.rtt + spec.jitter <= SHORT && spec.loss == 0.0;
        if unhindered && self.tcp_mbit_s < rate * TCP_PART {
            caveats.push(format!(
                "one TCP connection moved {:.0} of {rate:.0} Mbit/s",
                self.tcp_mbit_s
            ));
        }
        caveats
    }

    /// Whether more than the path's rate could be sent at all: a busy machine may not manage 10 Gbit/s.
    pub fn rate_was_reached(&self, spec: &PathSpec) -> bool {
        let wanted = spec.rate.unwrap_or(0) as f64 * (1.0 - spec.loss) * (1.0 - RATE_SLACK);
        self.udp_mbit_s.is_none_or(|rate| rate * 1e6 >= wanted)
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (rtt, p99) = (self.rtt_us as f64 / 1e3, self.rtt_p99_us as f64 / 1e3);
        write!(f, "round trip {rtt:.3} ms (p99 {p99:.3})")?;
        write!(f, ", loss {:.3} %", self.loss * 100.0)?;
        if let Some(rate) = self.udp_mbit_s {
            write!(f, ", UDP {rate:.0} Mbit/s")?;
        }
        write!(f, ", TCP {:.0} Mbit/s", self.tcp_mbit_s)
    }
}

struct Ends {
    source: String,
    destination: String,
    address: Ipv4Addr,
}

impl Ends {
    /// Runs `far` in the destination's namespace.
    fn beyond<T: Send + 'static>(
        &self,
        far: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        let namespace = self.destination.clone();
        thread::spawn(move || {
            namespace::enter(&namespace)?;
            far()
        })
    }

    /// Runs `near` in the source's namespace, to its end.
    fn here<T: Send>(&self, near: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    namespace::enter(&self.source)?;
                    near()
                })
                .join()
                .map_err(|_| anyhow!("a probe panicked"))?
        })
    }

    fn far_socket(&self, patience: Duration) -> Result<(UdpSocket, u16)> {
        let (address, namespace) = (self.address, self.destination.clone());
        let made = thread::spawn(move || {
            namespace::enter(&namespace)?;
            let socket = UdpSocket::bind((address, 0))?;
            socket.set_read_timeout(Some(patience))?;
            let port = socket.local_addr()?.port();
            anyhow::Ok((socket, port))
        });
        made.join().map_err(|_| anyhow!("a probe panicked"))?
    }

    fn near_socket(&self, port: u16, patience: Duration) -> Result<UdpSocket> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((self.address, port))?;
        socket.set_read_timeout(Some(patience))?;
        Ok(socket)
    }

    fn round_trips(&self, spec: &PathSpec) -> Result<Vec<Duration>> {
        let patience = 2 * (spec.rtt + spec.jitter) + Duration::from_millis(100);
        let (far, port) = self.far_socket(patience)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_over);
        let echo = thread::spawn(move || {
            let mut buffer = [0; SMALL];
            while !until.load(Ordering::Relaxed) {
                if let Ok((bytes, from)) = far.recv_from(&mut buffer) {
                    // A lost echo is a lost ping.
                    let _ = far.send_to(&buffer[..bytes], from);
                }
            }
        });
        let trips = self.here(|| {
            let socket = self.near_socket(port, patience)?;
            Ok((0..PINGS as u64)
                .filter_map(|number| ping(&socket, number).ok())
                .collect::<Vec<_>>())
        })?;
        is_over.store(true, Ordering::Relaxed);
        ensure!(trips.len() > PINGS / 2, "most pings were lost");
        echo.join().map_err(|_| anyhow!("the echo panicked"))?;
        Ok(trips)
    }

    fn loss(&self, spec: &PathSpec) -> Result<f64> {
        let patience = spec.rtt + spec.jitter + Duration::from_millis(300);
        let (far, port) = self.far_socket(patience)?;
        let counting = thread::spawn(move || count(&far, |_, _| ()));
        self.here(|| {
            let socket = self.near_socket(port, patience)?;
            for number in 0..LOSS_PACKETS {
                socket.send(&[0; SMALL])?;
                if number % PAUSE_EVERY == 0 {
                    thread::sleep(PAUSE);
                }
            }
            Ok(())
        })?;
        let arrived = counting
            .join()
            .map_err(|_| anyhow!("the counter panicked"))?;
        Ok(1.0 - arrived as f64 / f64::from(LOSS_PACKETS))
    }

    /// What arrives between the first and the last packet of a burst of a quarter more than the rate.
    fn rate(&self, spec: &PathSpec, rate: u64) -> Result<f64> {
        let patience = spec.rtt + spec.jitter + Duration::from_millis(300);
        let (far, port) = self.far_socket(patience)?;
        let counting = thread::spawn(move || {
            let (mut bytes, mut first, mut last) = (0_usize, None, Instant::now());
            count(&far, |size, now| {
                match first {
                    // What fills the bucket is not the rate.
                    None => first = Some(now + RATE_TIME / 4),
                    Some(from) if now >= from => {
                        bytes += size + HEADERS;
                        last = now;
                    }
                    Some(_) => {}
                }
            });
            let elapsed = first.map_or(Duration::ZERO, |from| last.saturating_duration_since(from));
            bytes as f64 * 8e-6 / elapsed.as_secs_f64().max(1e-6)
        });
        self.here(|| {
            let socket = self.near_socket(port, patience)?;
            flood(&socket, rate as f64 * 1.25)
        })?;
        counting.join().map_err(|_| anyhow!("the counter panicked"))
    }

    fn tcp_rate(&self) -> Result<f64> {
        let address = self.address;
        let (send_port, port) = std::sync::mpsc::channel();
        let receiving = self.beyond(move || {
            let listener = TcpListener::bind((address, 0))?;
            let _ = send_port.send(listener.local_addr()?.port());
            let (mut stream, _) = listener.accept()?;
            let mut buffer = vec![0; 1 << 18];
            let (mut bytes, started) = (0, Instant::now());
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(bytes as f64 * 8e-6 / started.elapsed().as_secs_f64()),
                    more => bytes += more,
                }
            }
        });
        let port = port.recv().context("the TCP probe does not listen")?;
        self.here(|| {
            let mut stream = TcpStream::connect((address, port))?;
            let (block, started) = (vec![0; 1 << 18], Instant::now());
            while started.elapsed() < RATE_TIME {
                stream.write_all(&block)?;
            }
            Ok(())
        })?;
        receiving
            .join()
            .map_err(|_| anyhow!("the TCP probe panicked"))?
    }
}

fn ping(socket: &UdpSocket, number: u64) -> Result<Duration> {
    let sent = Instant::now();
    socket.send(&number.to_le_bytes())?;
    let mut buffer = [0; SMALL];
    loop {
        let bytes = socket.recv(&mut buffer)?;
        // An answer to an earlier one came too late.
        if buffer[..bytes] == number.to_le_bytes() {
            return Ok(sent.elapsed());
        }
    }
}

/// Counts packets until none comes any more. The first may take its time: its sender has yet to start.
fn count(socket: &UdpSocket, mut each: impl FnMut(usize, Instant)) -> u64 {
    let (mut buffer, mut packets) = ([0; 2048], 0);
    let patience = socket.read_timeout().unwrap_or_default();
    let mut next = socket
        .set_read_timeout(Some(FIRST))
        .and_then(|()| socket.recv(&mut buffer));
    if socket.set_read_timeout(patience).is_err() {
        return 0;
    }
    while let Ok(bytes) = next {
        packets += 1;
        each(bytes, Instant::now());
        next = socket.recv(&mut buffer);
    }
    packets
}

/// Sends full packets at about `rate` bits per second.
fn flood(socket: &UdpSocket, rate: f64) -> Result<()> {
    let (started, mut sent) = (Instant::now(), 0_usize);
    while started.elapsed() < RATE_TIME {
        let due = rate / 8.0 * started.elapsed().as_secs_f64();
        if (sent as f64) < due {
            // A full socket buffer is as good as a full queue.
            let _ = socket.send(&[0; FULL]);
            sent += FULL + HEADERS;
        } else {
            thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(())
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(udp: f64, tcp: f64) -> Measured {
        Measured {
            rtt_us: 100,
            rtt_p99_us: 200,
            loss: 0.0,
            udp_mbit_s: Some(udp),
            tcp_mbit_s: tcp,
        }
    }

    #[test]
    fn a_path_that_carries_less_says_so() {
        let spec: PathSpec = "10g".parse().expect("a path");
        let slow = measured(4000.0, 3000.0);
        assert!(slow.agrees_with(&spec).is_ok());
        let caveats = slow.caveats(&spec);
        assert_eq!(caveats.len(), 2, "{caveats:?}");
        assert_eq!(caveats[0], "carried 4000 of 10000 Mbit/s");
        assert!(measured(4000.0, 9500.0).caveats(&spec).is_empty());
        assert!(measured(9990.0, 9400.0).caveats(&spec).is_empty());
    }

    #[test]
    fn a_path_that_carries_more_is_not_believed() {
        let spec: PathSpec = "1g".parse().expect("a path");
        assert!(measured(990.0, 950.0).agrees_with(&spec).is_ok());
        assert!(measured(1200.0, 950.0).agrees_with(&spec).is_err());
        assert!(measured(990.0, 1200.0).agrees_with(&spec).is_err());
    }
}
