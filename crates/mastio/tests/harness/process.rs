//! The server as a process: its log as it comes, its end however it comes.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{DEADLINE, LOOK_AGAIN, run, wait_for};

/// The lines that a server has written, as they come.
#[derive(Clone, Default)]
pub struct Log(Arc<(Mutex<Vec<Value>>, Condvar)>);

impl Log {
    /// Reads `lines` to their end in a thread of its own. A line that is not JSON is kept as a string.
    fn follow(&self, lines: impl std::io::Read + Send + 'static) -> JoinHandle<()> {
        let log = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                log.0.0.lock().unwrap().push(line);
                log.0.1.notify_all();
            }
        })
    }

    /// The lines so far.
    pub fn lines(&self) -> Vec<Value> {
        self.0.0.lock().unwrap().clone()
    }

    /// The lines so far, to be shown when something is wrong.
    pub fn text(&self) -> String {
        self.lines().iter().map(|line| format!("{line}\n")).collect()
    }

    /// The first line from `start` on that is `wanted`, waited for; nothing after the deadline.
    pub fn wait(&self, start: usize, wanted: impl Fn(&Value) -> bool, deadline: Duration) -> Option<Value> {
        let lines = self.0.0.lock().unwrap();
        let found = |lines: &Vec<Value>| lines.iter().skip(start).find(|line| wanted(line)).cloned();
        let (lines, _) =
            self.0.1.wait_timeout_while(lines, deadline, |lines| found(lines).is_none()).unwrap();
        found(&lines)
    }
}

/// `mastio` with nothing set yet. The kernel ends it with the test, however that ends.
pub fn mastio() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(env!("CARGO_BIN_EXE_mastio"));
    command
}

/// A server that runs, or has ended by itself. Dropped: killed.
pub struct Process {
    child: Child,
    reader: Option<JoinHandle<()>>,
    log: Log,
    /// How many lines the log had before.
    log_start: usize,
}

impl Process {
    /// Starts one that writes to `log`.
    pub fn start(command: &mut Command, log: &Log) -> Self {
        let log_start = log.lines().len();
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let reader = Some(log.follow(child.stderr.take().unwrap()));
        Self { child, reader, log: log.clone(), log_start }
    }

    /// Waits until the server listens. Returns the log's line that says where, or how the server ended instead.
    pub fn listening(&mut self) -> Result<Value, ExitStatus> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(line) =
                self.log.wait(self.log_start, |line| line["message"] == "listening", LOOK_AGAIN)
            {
                return Ok(line);
            }
            if self.child.try_wait().unwrap().is_some() {
                return Err(self.wait_for_its_end());
            }
            assert!(Instant::now() < deadline, "the server does not listen:\n{}", self.log.text());
        }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many lines the log had when this one started.
    pub fn log_start(&self) -> usize {
        self.log_start
    }

    /// Waits until the server has ended by itself and its last line is in the log.
    pub fn wait_for_its_end(&mut self) -> ExitStatus {
        let status = wait_for("the end of the server", || self.child.try_wait().unwrap());
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        status
    }

    /// Ends the server as an operator does, by SIGTERM, and waits until it has drained.
    pub fn stop(&mut self) {
        run(Command::new("kill").args(["-TERM", &self.child.id().to_string()]));
        let status = self.wait_for_its_end();
        assert!(status.success(), "the server ended with {status}:\n{}", self.log.text());
    }

    /// Ends the server as a power cut does.
    pub fn kill9(&mut self) {
        self.child.kill().unwrap();
        self.wait_for_its_end();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
        if let Some(reader) = self.reader.take() {
            // Its last lines are in the log before anybody shows it.
            let _read = reader.join();
        }
    }
}
