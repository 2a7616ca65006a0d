//! A Hugging Face tokenizer.
/// A tokenizer.
pub struct TextTokenizer;
