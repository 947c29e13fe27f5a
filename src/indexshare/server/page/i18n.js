// The words of the page in English and Chinese. An element with data-t="key" shows that text in the current language.

const WORDS = {
  en: {
    other_language: "中文",
    switch_language: "切换到中文",
    new_chat: "New chat",
    settings: "Settings",
    conversation: "Conversation",
    welcome: "Ask the model, or give it a document.",
    welcome_more: "Attach a text file or paste a long text. With “What the model read” switched on, every word of the answer shows which places of the prompt sparse attention selected for it.",
    draft: "Message",
    keys_hint: "Enter sends, Shift+Enter starts a line",
    attach: "Attach text files",
    attachments: "Attached documents",
    attachment: "{name} · {size} characters",
    remove: "Remove {name}",
    pasted: "Pasted text {number}",
    not_text: "{name} is not a text file (UTF-8). Convert it to text first.",
    send: "Send",
    stop: "Stop",
    close: "Close",
    cancel: "Cancel",
    save: "Save",
    copy: "Copy",
    copied: "Copied",
    retry: "Try again",
    edit: "Edit",
    read_button: "What it read",
    you: "You",
    model: "Model",
    prefill: "Reading the prompt … {seconds} s",
    thinking: "Reasoning … {seconds} s",
    thought: "Reasoning · {seconds} s",
    thought_tokens: "Reasoning · {tokens} tokens · {seconds} s",
    finished: "The answer is complete.",
    stopped: "Stopped.",
    no_answer: "The model ended without an answer after its reasoning. Try again, or switch reasoning off in the settings.",
    cut_off: "The answer reached the limit of tokens. Raise “Tokens at most” in the settings, or ask the model to go on.",
    usage: "{prompt} prompt tokens, {cached} of them cached · {completion} written · {rate} tokens/s · first after {first} s",
    context: "{tokens} tokens of context",
    loading: "The model is loading: {reason}",
    waiting: "The server at this address does not answer. Is `indexshare serve` running? Trying again …",
    error_offline: "The connection to the server is lost. See whether `indexshare serve` is still running, then try again.",
    error_key: "The server wants an API key, and this one is not right. Enter it in the settings, then try again.",
    error_busy: "The server is busy. Try again in {seconds} s.",
    error_context: "The conversation is too long for the model. Start a new chat or send a shorter document.",
    error_request: "The server refused the request. Change what it names, then try again.",
    error_server: "The server failed. Try again; if it happens again, look into its log (request {request}).",
    system_prompt: "System prompt",
    temperature: "Temperature",
    max_tokens: "Tokens at most",
    model_default: "default",
    reasoning_setting: "Reasoning",
    reasoning_max: "on, effort max",
    reasoning_high: "on, effort high",
    reasoning_off: "off",
    api_key: "API key",
    api_key_help: "Kept in this tab only, until it is closed.",
    api_key_needed: "The server wants an API key.",
    reading_title: "What the model read",
    reading_switch_help: "Show which places of the prompt each token of the answer read",
    reading_empty: "Send a message while this panel is open, or press “Try again” below an answer: the prompt appears here, with the places lit that sparse attention selected for each token of the answer.",
    reading_missing: "The server sent no selection with this answer.",
    layers: "Layers",
    all_layers: "all layer groups",
    go_to: "Go to",
    start: "start",
    message: "{role} {number}",
    previous_place: "Previous lit place",
    next_place: "Next lit place",
    place: "{number} of {total}",
    places: "Places: {total}",
    prompt_text: "The prompt as the model gets it",
    legend_token: "Share of layer groups:",
    legend_whole: "Among the most read:",
    any: "any",
    percent: "{share} %",
    written: "What it wrote",
    whole_answer: "Whole answer",
    whole_answer_help: "Show how often each place was read for the whole answer",
    tokens_label: "Generated tokens; arrow keys move between them",
    note_whole: "How often each place was read, over {tokens} tokens. Point at a token to see what was read to predict it.",
    note_token: "Token {number} {text}: {share} % of the text was read when it was predicted, in {total} places of the prompt.",
    note_everything: "Here the text is not longer than what sparse attention selects (top-k): the model attended to everything.",
    note_partly: "Not counted: {skipped} of {total} reads, which attended to everything (text not longer than top-k).",
    no_highlights: "This browser cannot light places in the text (no CSS Custom Highlight API). Use a newer one.",
  },
  zh: {
    other_language: "English",
    switch_language: "Switch to English",
    new_chat: "新对话",
    settings: "设置",
    conversation: "对话",
    welcome: "向模型提问，或给它一份文档。",
    welcome_more: "可以附加文本文件，或直接粘贴长文本。打开“模型读了什么”后，回答中的每个词元都会显示稀疏注意力为它选中了提示中的哪些位置。",
    draft: "输入消息",
    keys_hint: "Enter 发送，Shift+Enter 换行",
    attach: "附加文本文件",
    attachments: "已附加的文档",
    attachment: "{name} · {size} 个字符",
    remove: "移除 {name}",
    pasted: "粘贴的文本 {number}",
    not_text: "{name} 不是 UTF-8 文本文件，请先转换为文本。",
    send: "发送",
    stop: "停止",
    close: "关闭",
    cancel: "取消",
    save: "保存",
    copy: "复制",
    copied: "已复制",
    retry: "重试",
    edit: "编辑",
    read_button: "读了什么",
    you: "你",
    model: "模型",
    prefill: "正在读取提示 … {seconds} 秒",
    thinking: "正在推理 … {seconds} 秒",
    thought: "推理 · {seconds} 秒",
    thought_tokens: "推理 · {tokens} 个词元 · {seconds} 秒",
    finished: "回答已完成。",
    stopped: "已停止。",
    no_answer: "模型在推理之后没有给出回答。请重试，或在设置中关闭推理。",
    cut_off: "回答达到了词元数上限。请在设置中提高“最多词元数”，或让模型继续。",
    usage: "提示 {prompt} 个词元，其中 {cached} 个来自缓存 · 生成 {completion} 个 · {rate} 词元/秒 · 首个词元 {first} 秒",
    context: "上下文 {tokens} 个词元",
    loading: "模型正在加载：{reason}",
    waiting: "此地址上的服务器没有应答。`indexshare serve` 在运行吗？正在重试 …",
    error_offline: "与服务器的连接已断开。请确认 `indexshare serve` 仍在运行，然后重试。",
    error_key: "服务器需要 API 密钥，而当前密钥不正确。请在设置中填写后重试。",
    error_busy: "服务器繁忙，请在 {seconds} 秒后重试。",
    error_context: "对话超出了模型的长度。请开始新对话，或发送更短的文档。",
    error_request: "服务器拒绝了请求。请修改它指出的内容，然后重试。",
    error_server: "服务器出错。请重试；若再次发生，请查看服务器日志（请求 {request}）。",
    system_prompt: "系统提示",
    temperature: "温度",
    max_tokens: "最多词元数",
    model_default: "默认",
    reasoning_setting: "推理",
    reasoning_max: "开启，强度 max",
    reasoning_high: "开启，强度 high",
    reasoning_off: "关闭",
    api_key: "API 密钥",
    api_key_help: "只保存在此标签页中，关闭后即清除。",
    api_key_needed: "服务器需要 API 密钥。",
    reading_title: "模型读了什么",
    reading_switch_help: "显示回答中的每个词元读了提示的哪些位置",
    reading_empty: "在此面板打开时发送一条消息，或点击回答下方的“重试”：提示会显示在这里，并点亮稀疏注意力为回答中每个词元选中的位置。",
    reading_missing: "服务器没有随这个回答发送选择数据。",
    layers: "层",
    all_layers: "全部层组",
    go_to: "跳到",
    start: "开头",
    message: "{role} {number}",
    previous_place: "上一处",
    next_place: "下一处",
    place: "第 {number} 处，共 {total} 处",
    places: "{total} 处",
    prompt_text: "模型得到的提示全文",
    legend_token: "读取它的层组比例：",
    legend_whole: "读取最多的：",
    any: "任意",
    percent: "{share} %",
    written: "它写了什么",
    whole_answer: "整个回答",
    whole_answer_help: "显示整个回答中每个位置被读取的频率",
    tokens_label: "生成的词元；用方向键移动",
    note_whole: "各位置在 {tokens} 个词元中被读取的频率。指向一个词元，可看到预测它时读了什么。",
    note_token: "第 {number} 个词元 {text}：预测它时读取了全文的 {share} %，在提示中共 {total} 处。",
    note_everything: "此处文本不比稀疏注意力的选择数（top-k）长：模型读取了全部内容。",
    note_partly: "未计入：{total} 次读取中有 {skipped} 次读取了全部内容（文本不比 top-k 长）。",
    no_highlights: "此浏览器无法在文本中点亮位置（不支持 CSS Custom Highlight API），请使用更新的版本。",
  },
};

let language = "en";
const valuesOf = new WeakMap(); // what stands in the {gaps} of an element's text

export function currentLanguage() {
  return language;
}

/** The text for `key`, its {gaps} filled; numbers are written as the language writes them. */
export function t(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? value.toLocaleString(language, { maximumFractionDigits: value < 10 ? 2 : value < 100 ? 1 : 0 }) : String(value);
  });
}

/** Show the text for `key` in `element`, now and after the language changes. */
export function say(element, key, values) {
  element.dataset.t = key;
  valuesOf.set(element, values);
  element.textContent = t(key, values);
}

/** Translate every marked element under `root`. */
export function translate(root = document) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t, valuesOf.get(element));
  for (const element of root.querySelectorAll("[data-t-title]")) {
    element.title = t(element.dataset.tTitle);
    element.ariaLabel = element.title;
  }
  for (const element of root.querySelectorAll("[data-t-label]")) element.ariaLabel = t(element.dataset.tLabel);
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
}

/** "en" or "zh": what the user chose before, else what the browser asks for. */
export function preferredLanguage(chosen) {
  return chosen in WORDS ? chosen : navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export function setLanguage(name) {
  language = name;
  document.documentElement.lang = name === "zh" ? "zh-CN" : name;
  translate();
}
