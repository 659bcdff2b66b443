//! Server-sent events, as far as one answer needs them: the data of each event, as soon as it is complete.
//!
//! Source: WHATWG HTML §9.2.6, interpreting an event stream. Only `data` matters here; `event`, `id`, `retry` and
//! comments are skipped. The caller bounds the bytes.

/// Takes bytes as they arrive and gives the data of whole events.
#[derive(Default)]
pub struct EventStream {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_carriage_return: bool,
}

impl EventStream {
    /// Takes `bytes` and gives the data of every event that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut complete = Vec::new();
        for &byte in bytes {
            // CR, LF and CRLF each end a line.
            let second_half = byte == b'\n' && self.after_carriage_return;
            self.after_carriage_return = byte == b'\r';
            match byte {
                _ if second_half => {}
                b'\n' | b'\r' => complete.extend(self.end_line()),
                _ => self.line.push(byte),
            }
        }
        complete
    }

    /// What was begun when the stream ended. Some servers close without the last empty line.
    #[must_use]
    pub fn finish(mut self) -> Option<Vec<u8>> {
        if !self.line.is_empty() {
            self.end_line();
        }
        self.take()
    }

    fn end_line(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return self.take();
        }
        let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line);
        let value = match line.strip_prefix(b"data:") {
            Some(value) => value.strip_prefix(b" ").unwrap_or(value),
            None if line == b"data" => b"",
            None => return None,
        };
        if self.has_data {
            self.data.push(b'\n');
        }
        self.has_data = true;
        self.data.extend_from_slice(value);
        None
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        std::mem::take(&mut self.has_data).then(|| std::mem::take(&mut self.data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let stream = b"\xef\xbb\xbf: hi\r\nevent: message\r\ndata: {\"a\":\r\ndata: 1}\r\n\r\nid: 7\n\ndata:x\ry: 1\r\rdata\n\n";
        let expected: Vec<&[u8]> = vec![b"{\"a\":\n1}", b"x", b""];
        for size in 1..stream.len() {
            let mut events = EventStream::default();
            let found: Vec<Vec<u8>> = stream.chunks(size).flat_map(|chunk| events.push(chunk)).collect();
            assert_eq!(found, expected, "in pieces of {size} bytes");
            assert_eq!(events.finish(), None);
        }
    }

    #[test]
    fn an_event_that_the_end_of_the_stream_cuts_off_is_still_read() {
        let mut events = EventStream::default();
        assert!(events.push(b"data: 1\ndata: 2").is_empty());
        assert_eq!(events.finish().as_deref(), Some(&b"1\n2"[..]));
    }
}
