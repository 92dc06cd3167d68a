//! Server-sent events out of bytes, as the OpenAI dialect uses them: `data:` lines, blank lines between events,
//! comments ignored, lines and characters cut anywhere by the network.

/// Takes bytes as they come and gives the data of whole events.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_cr: bool,
    begun: bool,
}

/// An event that is longer than this is refused.
pub const MAX_EVENT: usize = 8 << 20;

/// A stream that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of more than {MAX_EVENT} bytes found in the stream")]
pub struct TooLong;

impl SseParser {
    /// Takes the next bytes; whole events are handed to `on_data`, bytes that are not UTF-8 as U+FFFD.
    ///
    /// # Errors
    /// An event beyond [`MAX_EVENT`].
    pub fn push(&mut self, bytes: &[u8], on_data: &mut dyn FnMut(String)) -> Result<(), TooLong> {
        for &byte in bytes {
            let after_cr = std::mem::take(&mut self.after_cr);
            match byte {
                // The second half of a line end.
                b'\n' if after_cr => {}
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    self.end_line(on_data);
                }
                _ => self.line.push(byte),
            }
            if self.line.len() + self.data.len() > MAX_EVENT {
                return Err(TooLong);
            }
        }
        Ok(())
    }

    /// Ends the stream. An event without its blank line is given too: some servers leave the last one out.
    pub fn finish(mut self, on_data: &mut dyn FnMut(String)) {
        if !self.line.is_empty() {
            self.end_line(on_data);
        }
        self.dispatch(on_data);
    }

    fn end_line(&mut self, on_data: &mut dyn FnMut(String)) {
        let mut line = std::mem::take(&mut self.line);
        if !std::mem::replace(&mut self.begun, true) && line.starts_with(b"\xEF\xBB\xBF") {
            line.drain(..3);
        }
        if line.is_empty() {
            return self.dispatch(on_data);
        }
        let (field, value) = match line.iter().position(|&byte| byte == b':') {
            Some(at) => (&line[..at], &line[at + 1..]),
            None => (&line[..], &[][..]),
        };
        if field == b"data" {
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push(b'\n');
            }
            let value = value.strip_prefix(b" ").unwrap_or(value);
            self.data.extend_from_slice(value);
        }
    }

    fn dispatch(&mut self, on_data: &mut dyn FnMut(String)) {
        let data = std::mem::take(&mut self.data);
        if std::mem::take(&mut self.has_data) {
            on_data(String::from_utf8_lossy(&data).into_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(pieces: &[&[u8]]) -> Vec<String> {
        let mut events = Vec::new();
        let mut parser = SseParser::default();
        for piece in pieces {
            parser.push(piece, &mut |data| events.push(data)).unwrap();
        }
        parser.finish(&mut |data| events.push(data));
        events
    }

    #[test]
    fn fields_comments_and_line_ends() {
        let text = b"\xEF\xBB\xBFdata: {\"a\":1}\n\n: keep-alive\n\nevent: x\ndata:two\ndata: lines\r\n\r\nid: 3\n\ndata\n\ndata: [DONE]";
        assert_eq!(parse(&[text]), ["{\"a\":1}", "two\nlines", "", "[DONE]"]);
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = SseParser::default();
        let block = vec![b'x'; 1 << 20];
        let error = (0..9).find_map(|_| parser.push(&block, &mut |_| {}).err());
        assert_eq!(error, Some(TooLong));
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(text in "(data: [a-zé€😀]{0,5}|:c|data:|\r|\n|\r\n|\n\n){0,20}", cuts in prop::collection::vec(0usize..60, 0..8)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(parse(&pieces), parse(&[bytes]));
        }

        #[test]
        fn any_bytes_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            parse(&[&bytes]);
        }
    }
}
