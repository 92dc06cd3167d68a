//! Token F1 of question answering: SQuAD's (LongBench, L-Eval, M4LE), and LongBench's for Chinese.

use super::segment::jieba;
use super::{counts, overlap};
use crate::python::chars::is_space;
use crate::python::text::{delete_punctuation, replace_articles, split};

/// Punctuation LongBench deletes from Chinese tokens beside the ASCII set. It lacks `《`, as published.
const CHINESE_PUNCTUATION: &str = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.";

/// SQuAD's normal form: lower case, ASCII punctuation deleted, the words a, an, the removed.
pub fn normalize(text: &str) -> String {
    let text = delete_punctuation(&text.to_lowercase());
    split(&replace_articles(&text))
        .collect::<Vec<_>>()
        .join(" ")
}

/// F1 of the tokens' multisets; 0 where nothing is shared, also for two empty lists.
pub fn token_f1<'a>(
    prediction: impl IntoIterator<Item = &'a str>,
    gold: impl IntoIterator<Item = &'a str>,
) -> f64 {
    let prediction = counts(prediction);
    let gold = counts(gold);
    let shared = overlap(&prediction, &gold) as f64;
    if shared == 0.0 {
        return 0.0;
    }
    let precision = shared / prediction.values().sum::<usize>() as f64;
    let recall = shared / gold.values().sum::<usize>() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// F1 over the normal forms' whitespace tokens, 0 to 1.
pub fn qa_f1(prediction: &str, gold: &str) -> f64 {
    let (prediction, gold) = (normalize(prediction), normalize(gold));
    token_f1(split(&prediction), split(&gold))
}

/// Tokens of Chinese text: jieba words in lower case without punctuation and spaces, empty ones dropped.
pub fn chinese_tokens(text: &str) -> Vec<String> {
    let deleted =
        |c: char| c.is_ascii_punctuation() || CHINESE_PUNCTUATION.contains(c) || is_space(c);
    jieba(text)
        .into_iter()
        .map(|word| {
            let word = word.to_lowercase();
            word.chars().filter(|&c| !deleted(c)).collect::<String>()
        })
        .filter(|word| !word.is_empty())
        .collect()
}

/// F1 over [`chinese_tokens`], 0 to 1.
pub fn qa_f1_zh(prediction: &str, gold: &str) -> f64 {
    let (prediction, gold) = (chinese_tokens(prediction), chinese_tokens(gold));
    token_f1(
        prediction.iter().map(String::as_str),
        gold.iter().map(String::as_str),
    )
}
