//! One "host": a network namespace with an address on the rig's switch.

use std::ffi::OsStr;
use std::fmt;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::Result;

use crate::namespace;
use crate::shell::{run, run_line};

/// The interface every host has.
pub const INTERFACE: &str = "eth0";

/// A host of the rig.
#[derive(Debug, Clone)]
pub struct Host {
    namespace: String,
    address: Ipv4Addr,
}

impl Host {
    /// Makes the namespace and plugs it into the bridge `br0` of the namespace `switch`.
    pub(crate) fn plug_in(
        namespace: &str,
        switch: &str,
        port: &str,
        address: Ipv4Addr,
    ) -> Result<Self> {
        namespace::add(namespace)?;
        run_line(&format!(
            "ip -n {switch} link add {port} type veth peer name {INTERFACE} netns {namespace}"
        ))?;
        run_line(&format!("ip -n {switch} link set {port} master br0 up"))?;
        run_line(&format!(
            "ip -n {namespace} addr add {address}/24 dev {INTERFACE}"
        ))?;
        run_line(&format!("ip -n {namespace} link set {INTERFACE} up"))?;
        Ok(Self {
            namespace: namespace.to_owned(),
            address,
        })
    }

    /// The host's own address, which never moves.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The name of the host's network namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A command that will run on this host and keep its PID while entering it.
    ///
    /// Never `ip netns exec`: that makes a mount namespace whose shared mounts CRIU refuses to dump.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut net = std::ffi::OsString::from("--net=");
        net.push(namespace::path(&self.namespace));
        let mut command = Command::new("nsenter");
        command.arg(net).arg("--").arg(program);
        command
    }

    /// Runs a line of shell on this host, as an operator's hook would.
    pub fn shell(&self, line: &str) -> Result<String> {
        run(self.command("sh").arg("-ec").arg(line))
    }

    /// The packet filter's rules: whatever a migration adds must be gone after it.
    pub fn filter_rules(&self) -> Result<String> {
        let rules = run(self.command("nft").args(["-s", "list", "ruleset"]))?;
        Ok(rules
            .lines()
            .filter(|line| line.contains("drop") || line.contains("CRIU"))
            .collect::<Vec<_>>()
            .join("\n"))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.namespace)
    }
}
