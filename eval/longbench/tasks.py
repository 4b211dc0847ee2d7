"""The 21 tasks of LongBench v1 (Bai et al. 2023, arXiv 2308.14508): prompt, length and metric of each, as published."""
# ruff: noqa: RUF001

import dataclasses

from eval.common.text_metrics import CLASSIFICATION
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import nearest


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: what is asked, how long an answer may be, how it is scored."""

    name: str
    category: str
    metric: str  # of text_metrics
    max_new_tokens: int
    prompt: str  # with {context} and {input}

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is put into the model's chat template: not where it ends in examples or code to go on."""
        return self.category not in ("few-shot", "code")

    @property
    def is_one_line(self) -> bool:
        """Whether only the first line of a prediction counts."""
        return self.category == "few-shot"


_MULTI_HOP = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)

_TASKS = (
    Task(
        "narrativeqa",
        "single-document QA",
        "token_f1",
        128,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single "
        "phrase if possible. Do not provide any explanation.\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    Task(
        "qasper",
        "single-document QA",
        "token_f1",
        128,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: {context}\n\n"
        " Answer the question based on the above article as concisely as you can, using a single phrase or sentence "
        "if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide '
        "any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    Task(
        "multifieldqa_en",
        "single-document QA",
        "token_f1",
        64,
        "Read the following text and answer briefly.\n\n"
        "{context}\n\nNow, answer the following question based on the above text, only give me the answer and do not "
        "output any other words.\n\nQuestion: {input}\n"
        "Answer:",
    ),
    Task(
        "multifieldqa_zh",
        "single-document QA",
        "token_f1_zh",
        64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n"
        "回答：",
    ),
    Task(
        "hotpotqa",
        "multi-document QA",
        "token_f1",
        32,
        _MULTI_HOP,
    ),
    Task(
        "2wikimqa",
        "multi-document QA",
        "token_f1",
        32,
        _MULTI_HOP,
    ),
    Task(
        "musique",
        "multi-document QA",
        "token_f1",
        32,
        _MULTI_HOP,
    ),
    Task(
        "dureader",
        "multi-document QA",
        "rouge_l_zh",
        128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    Task(
        "gov_report",
        "summarisation",
        "rouge_l",
        512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\n"
        "Summary:",
    ),
    Task(
        "qmsum",
        "summarisation",
        "rouge_l",
        512,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
        "one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
    ),
    Task(
        "multi_news",
        "summarisation",
        "rouge_l",
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\n"
        "Summary:",
    ),
    Task(
        "vcsum",
        "summarisation",
        "rouge_l_zh",
        512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    Task(
        "trec",
        "few-shot",
        CLASSIFICATION,
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    ),
    Task(
        "triviaqa",
        "few-shot",
        "token_f1",
        32,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n"
        "{input}",
    ),
    Task(
        "samsum",
        "few-shot",
        "rouge_l",
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    ),
    Task(
        "lsht",
        "few-shot",
        CLASSIFICATION,
        64,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    ),
    Task(
        "passage_count",
        "synthetic",
        "count",
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n"
        "{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format "
        "should only contain the number, such as 1, 2, 3, and so on.\n\n"
        "The final answer is: ",
    ),
    Task(
        "passage_retrieval_en",
        "synthetic",
        "retrieval",
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n"
        "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be "
        'like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
    ),
    Task(
        "passage_retrieval_zh",
        "synthetic",
        "retrieval_zh",
        32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n'
        "答案是：",
    ),
    Task(
        "lcc",
        "code",
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}Next line of code:\n",
    ),
    Task(
        "repobench-p",
        "code",
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    ),
)

TASKS = {task.name: task for task in _TASKS}
CATEGORIES = tuple(dict.fromkeys(task.category for task in _TASKS))
# Those that LongBench-E has too, with as many texts of each length
TASKS_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)


def find_task(name: str) -> Task:
    """Return the task of that name; raises InputError with the nearest one."""
    if name not in TASKS:
        raise InputError(f"there is no LongBench task '{name}'{nearest(name, tuple(TASKS))}")
    return TASKS[name]
