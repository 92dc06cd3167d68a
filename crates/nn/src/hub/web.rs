//! Files of a model hub over HTTPS: `ENDPOINT/REPO/resolve/REVISION/FILE`, continued by ranges after a break.
//!
//! The hub names the SHA-256 of large files before it sends them, so a file that is not the pinned one
//! is refused before a byte of it arrives.

use super::error::HubError;
use super::progress::{Reporter, Stage};
use super::store::{self, CopyError, Partial};
use std::io::Read;
use std::time::Duration;
use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

const ENDPOINT: &str = "https://huggingface.co";
/// A machine without a way to the hub should fall to the next source quickly.
const CONNECT: Duration = Duration::from_secs(3);
/// A connection that is silent this long is given up and continued by a new one.
const STALL: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 8;
/// Connections that a single download may use up; each but the last broke after some progress.
const MAX_CONNECTIONS: usize = 100;

/// A hub, and who we are to it.
#[derive(Clone)]
pub struct Web {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// What is expected of a file before it is fetched.
#[derive(Clone, Copy)]
pub struct Pinned<'a> {
    pub size: u64,
    pub sha256: &'a str,
}

/// What the hub said about the file.
pub struct Fetched {
    /// SHA-256 of the content by the hub's word (large files only).
    pub sha256: Option<String>,
}

impl Web {
    /// `HF_ENDPOINT` (else huggingface.co) with the token in `HF_TOKEN`, if any.
    pub fn from_env() -> Web {
        let value = |name| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
        Web::new(
            &value("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()),
            value("HF_TOKEN"),
        )
    }

    /// The hub at `endpoint`, for instance `https://huggingface.co`.
    pub fn new(endpoint: &str, token: Option<String>) -> Web {
        Web::with_proxy(endpoint, token, ureq::Proxy::try_from_env())
    }

    /// [`Web::new`] with the given proxy in place of the environment's.
    pub fn with_proxy(endpoint: &str, token: Option<String>, proxy: Option<ureq::Proxy>) -> Web {
        let agent = Agent::config_builder()
            .proxy(proxy)
            .http_status_as_error(false)
            // Redirects are followed here: their headers matter, and the token must stay with the hub.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(STALL))
            .timeout_per_read(Some(STALL))
            .user_agent(concat!("longspan/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Web {
            agent,
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            token: token.map(|token| token.trim().to_owned()),
        }
    }

    fn url(&self, repo: &str, revision: &str, file: &str) -> String {
        format!("{}/{repo}/resolve/{revision}/{file}", self.endpoint)
    }

    /// A small text file of a repository; `None` if there is none of that name.
    pub fn text(&self, repo: &str, file: &str, limit: u64) -> Result<Option<Vec<u8>>, HubError> {
        let url = self.url(repo, "main", file);
        self.small(&url, limit)
    }

    /// Names of a repository's files that end with `suffix`, by the hub's index.
    pub fn files(&self, repo: &str, suffix: &str) -> Result<Vec<String>, HubError> {
        #[derive(serde::Deserialize)]
        struct Index {
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!("{}/api/models/{repo}", self.endpoint);
        let Some(bytes) = self.small(&url, 16 << 20)? else {
            return Err(HubError::Status { url, status: 404 });
        };
        let index: Index = serde_json::from_slice(&bytes).map_err(|e| HubError::Network {
            reason: format!("the hub's index is not understood ({e})"),
            url,
        })?;
        Ok(index
            .siblings
            .into_iter()
            .map(|s| s.rfilename)
            .filter(|name| name.ends_with(suffix))
            .collect())
    }

    fn small(&self, url: &str, limit: u64) -> Result<Option<Vec<u8>>, HubError> {
        let (mut response, _) = self.get(url, 0)?;
        match response.status() {
            StatusCode::OK => response
                .body_mut()
                .with_config()
                .limit(limit)
                .read_to_vec()
                .map(Some)
                .map_err(|e| network(url, &e)),
            StatusCode::NOT_FOUND => Ok(None),
            other => Err(HubError::Status {
                url: url.to_owned(),
                status: other.as_u16(),
            }),
        }
    }

    /// Fetches a file into `partial`, continuing what is there. The caller verifies the hash.
    ///
    /// # Errors
    /// Unreachable hub, refusal, a file that is not the pinned one, a break that does not heal.
    pub fn download(
        &self,
        repo: &str,
        revision: &str,
        file: &str,
        pinned: Option<Pinned<'_>>,
        partial: &mut Partial,
        reporter: &Reporter<'_>,
    ) -> Result<Fetched, HubError> {
        let url = self.url(repo, revision, file);
        for _ in 0..MAX_CONNECTIONS {
            let start = partial.bytes();
            reporter.tick(Stage::Downloading, start, pinned.map(|p| p.size))?;
            if let Some(pinned) = pinned.filter(|p| p.size == start) {
                // All is there from an earlier pull that was stopped before the verification.
                return Ok(Fetched {
                    sha256: Some(pinned.sha256.to_owned()),
                });
            }
            let (mut response, told) = self.get(&url, start)?;
            let status = response.status();
            let (offset, total) = match status {
                StatusCode::OK => (0, length(&response)),
                StatusCode::PARTIAL_CONTENT => {
                    content_range(&response).ok_or_else(|| HubError::Network {
                        url: url.clone(),
                        reason: "the hub sent a part without saying which".to_owned(),
                    })?
                }
                StatusCode::RANGE_NOT_SATISFIABLE if start > 0 => {
                    if told.size == Some(start) && told.etag.as_deref() == partial.etag() {
                        return Ok(Fetched {
                            sha256: told.sha256,
                        });
                    }
                    partial.clear(None)?;
                    continue;
                }
                other => {
                    return Err(HubError::Status {
                        url,
                        status: other.as_u16(),
                    });
                }
            };
            let mut total = total.or(told.size);
            if let Some(pinned) = pinned {
                refuse_other(file, repo, pinned, &told, total)?;
                total = Some(pinned.size);
            }
            if offset != start || (start > 0 && told.etag.as_deref() != partial.etag()) {
                // The content changed, or the hub ignores ranges: start over.
                partial.clear(told.etag.clone())?;
                if offset != 0 {
                    continue;
                }
            } else if start == 0 {
                partial.clear(told.etag.clone())?;
            }
            let begin = partial.bytes();
            let needed = total.unwrap_or(0).saturating_sub(begin);
            let mut writer = partial.writer()?;
            let mut tick = store::ticker(*reporter, Stage::Downloading, begin, total);
            // One byte more than expected shows that there are too many.
            let most = total.map_or(u64::MAX, |total| total - begin.min(total) + 1);
            let mut reader = response.body_mut().as_reader().take(most);
            let result = store::copy(&mut reader, &mut writer, &mut tick);
            // Whatever arrived is kept, however the copy ended.
            let now = writer
                .metadata()
                .map_err(|e| HubError::local("read", partial.path(), e, 0))?
                .len();
            partial.commit(&writer, now - begin, 0)?;
            let broken = match result {
                Ok(_) if total.is_none_or(|total| total == now) => {
                    return Ok(Fetched {
                        sha256: told.sha256,
                    });
                }
                Ok(_) => None,
                Err(CopyError::Read(error)) => Some(error),
                Err(CopyError::Write(e)) => {
                    return Err(HubError::local("write", partial.path(), e, needed));
                }
                Err(CopyError::Stopped(error)) => return Err(error),
            };
            if now > begin && total.is_some_and(|total| now < total) {
                continue; // a break in the middle: continue by a range
            }
            if total.is_some_and(|total| now > total) {
                partial.clear(None)?;
            }
            return Err(match (broken, total) {
                (Some(error), _) => HubError::Network {
                    url,
                    reason: format!("the connection broke after {now} bytes ({error})"),
                },
                (None, total) => HubError::WrongSize {
                    file: file.to_owned(),
                    origin: format!("hub {repo}"),
                    found: now,
                    expected: total.unwrap_or(now),
                },
            });
        }
        Err(HubError::Network {
            reason: format!(
                "the connection broke {MAX_CONNECTIONS} times, at last after {} bytes; the next pull continues",
                partial.bytes()
            ),
            url,
        })
    }

    /// GET from byte `start`, following redirects, with what the hub told about the file on the way.
    fn get(&self, url: &str, start: u64) -> Result<(Response<ureq::Body>, Told), HubError> {
        let mut url = url.to_owned();
        let mut told = Told::default();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self
                .agent
                .get(&url)
                .header(header::ACCEPT_ENCODING, "identity");
            if start > 0 {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            if let Some(token) = &self.token
                && origin(&url) == origin(&self.endpoint)
            {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| network(&url, &e))?;
            told.learn(&response);
            if !response.status().is_redirection() {
                return Ok((response, told));
            }
            let Some(location) = text(&response, header::LOCATION.as_str()) else {
                return Ok((response, told));
            };
            url = join(&url, location);
        }
        Err(HubError::Network {
            reason: format!("more than {MAX_REDIRECTS} redirects"),
            url,
        })
    }
}

/// What the answers' headers say about a file.
#[derive(Default)]
struct Told {
    etag: Option<String>,
    sha256: Option<String>,
    size: Option<u64>,
}

impl Told {
    fn learn(&mut self, response: &Response<ureq::Body>) {
        // The hub's own tag comes first; the tag of the store it redirects to may be another.
        if self.etag.is_none() {
            self.etag = text(response, "x-linked-etag")
                .or_else(|| text(response, "etag"))
                .map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        }
        if self.sha256.is_none() {
            self.sha256 = text(response, "x-linked-etag")
                .map(|etag| etag.trim_matches('"').to_lowercase())
                .filter(|etag| etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()));
        }
        if self.size.is_none() {
            self.size = text(response, "x-linked-size").and_then(|size| size.parse().ok());
        }
    }
}

fn refuse_other(
    file: &str,
    repo: &str,
    pinned: Pinned<'_>,
    told: &Told,
    total: Option<u64>,
) -> Result<(), HubError> {
    if let Some(found) = told
        .sha256
        .as_deref()
        .filter(|&found| found != pinned.sha256)
    {
        return Err(HubError::WrongHash {
            file: file.to_owned(),
            origin: format!("hub {repo}"),
            found: found.to_owned(),
            expected: pinned.sha256.to_owned(),
        });
    }
    if let Some(found) = total.filter(|&found| found != pinned.size) {
        return Err(HubError::WrongSize {
            file: file.to_owned(),
            origin: format!("hub {repo}"),
            found,
            expected: pinned.size,
        });
    }
    Ok(())
}

fn text<'a>(response: &'a Response<ureq::Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn length(response: &Response<ureq::Body>) -> Option<u64> {
    text(response, "content-length")?.trim().parse().ok()
}

/// `Content-Range: bytes FIRST-LAST/TOTAL` as (first, total).
fn content_range(response: &Response<ureq::Body>) -> Option<(u64, Option<u64>)> {
    let range = text(response, "content-range")?
        .trim()
        .strip_prefix("bytes ")?;
    let (range, total) = range.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, total.trim().parse().ok()))
}

/// `scheme://host:port` of a URL.
fn origin(url: &str) -> &str {
    let after = url.find("://").map_or(0, |at| at + 3);
    let end = url[after..]
        .find(['/', '?', '#'])
        .map_or(url.len(), |at| after + at);
    &url[..end]
}

/// A redirect's target: absolute, or relative to the host.
fn join(url: &str, location: &str) -> String {
    if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{}//{rest}", &url[..url.find("//").unwrap_or(0)])
    } else if location.starts_with('/') {
        format!("{}{location}", origin(url))
    } else {
        let folder = url.rfind('/').map_or(url, |at| &url[..at]);
        format!("{folder}/{location}")
    }
}

fn network(url: &str, error: &ureq::Error) -> HubError {
    HubError::Network {
        url: origin(url).to_owned(),
        reason: error.to_string(),
    }
}
