//! `longspan papers`: the reading list, from the pages that ship inside the program.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

include!(concat!(env!("OUT_DIR"), "/papers.rs"));

/// Front matter of a paper's page.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Paper {
    /// Number in the list.
    pub number: u32,
    /// The paper's title.
    pub title: String,
    /// arXiv id.
    pub arxiv: String,
    /// Where the code lives.
    pub code: String,
    /// How to use it.
    pub command: String,
    /// Its test file.
    #[serde(default)]
    pub test: String,
    /// What `longspan reproduce` runs.
    #[serde(default)]
    pub recipe: String,
    /// "built" or "planned".
    pub status: String,
    /// What the paper claims.
    pub claim: String,
    /// What we measured.
    #[serde(default)]
    pub measured: String,
}

/// The pages: (file name, front matter, body).
pub fn pages() -> Result<Vec<(&'static str, Paper, &'static str)>> {
    let mut pages = PAGES
        .iter()
        .map(|&(name, text)| {
            let (front, body) = text
                .strip_prefix("+++\n")
                .and_then(|rest| rest.split_once("\n+++"))
                .with_context(|| format!("papers/{name}: no front matter between +++ lines"))?;
            let paper: Paper = toml::from_str(front).with_context(|| format!("papers/{name}"))?;
            Ok((name, paper, body.trim()))
        })
        .collect::<Result<Vec<_>>>()?;
    pages.sort_by_key(|(_, paper, _)| paper.number);
    Ok(pages)
}

/// Prints the list, or one page.
pub fn print(number: Option<u32>, as_json: bool) -> Result<()> {
    let pages = pages()?;
    let Some(number) = number else {
        for (_, paper, _) in &pages {
            if as_json {
                println!("{}", serde_json::to_string(paper)?);
            } else {
                println!(
                    "{:02} {:<8} {:<60} {}",
                    paper.number,
                    paper.status,
                    shorten(&paper.title, 60),
                    paper.command
                );
            }
        }
        return Ok(());
    };
    let (_, paper, body) = pages
        .iter()
        .find(|(_, paper, _)| paper.number == number)
        .with_context(|| {
            format!(
                "there is no paper {number}; `longspan papers` lists 1 to {}",
                pages.len()
            )
        })?;
    if as_json {
        println!("{}", serde_json::to_string(paper)?);
    } else {
        println!(
            "{}\narXiv {} - {}\n\nclaim: {}\nmeasured: {}\ncommand: {}\n\n{body}",
            paper.title, paper.arxiv, paper.code, paper.claim, paper.measured, paper.command
        );
    }
    Ok(())
}

fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        text.to_string()
    } else {
        text.chars().take(width - 3).chain("...".chars()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::path::Path;

    #[test]
    fn pages_name_what_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let pages = pages().unwrap();
        assert!(pages.len() >= 58, "found {} pages", pages.len());
        for (name, paper, body) in pages {
            assert!(
                name.starts_with(&format!("{:02}-", paper.number)),
                "{name}: number is {}",
                paper.number
            );
            assert!(
                ["built", "planned"].contains(&paper.status.as_str()),
                "{name}: status {:?}",
                paper.status
            );
            if paper.status != "built" {
                continue;
            }
            for path in [&paper.code, &paper.test, &paper.recipe] {
                for path in path
                    .split(',')
                    .map(str::trim)
                    .filter(|path| !path.is_empty())
                {
                    assert!(root.join(path).exists(), "{name}: {path} does not exist");
                }
            }
            assert!(
                !paper.test.is_empty() && !paper.measured.is_empty() && body.len() > 400,
                "{name}: a built paper has a test, figures and a text"
            );
            let mut words = paper.command.split_whitespace();
            assert_eq!(
                words.next(),
                Some("longspan"),
                "{name}: command {:?}",
                paper.command
            );
            let verb = words.next().unwrap();
            assert!(
                crate::cli::Cli::command().find_subcommand(verb).is_some(),
                "{name}: there is no command {verb}"
            );
        }
    }

    #[test]
    fn the_readme_table_is_that_of_the_pages() {
        let readme = include_str!("../../../README.md");
        for (name, paper, _) in pages().unwrap() {
            let row = format!("| {:02} | [{}](papers/{name}) |", paper.number, paper.title);
            assert!(
                readme.contains(&row),
                "README.md lacks the row\n{row}\nrun scripts/readme-table.sh"
            );
        }
    }
}
