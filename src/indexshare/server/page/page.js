// Puts the parts together: the bar, the conversation, the composer, the settings and the reading panel.

import { getModel, whyNotReady } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { currentLanguage, preferredLanguage, say, setLanguage } from "./i18n.js";
import { ReadingPanel } from "./reading.js";
import { Settings, SettingsDialog } from "./settings.js";

const POLL = 1000; // ms between two questions whether the model is loaded

const byId = (id) => document.getElementById(id);
const settings = new Settings();
const dialog = new SettingsDialog(settings);
const panel = new ReadingPanel();
let isReady = false;
let shown = null; // the recording in the panel

const page = {
  settings,
  model: "",
  askForKey: () => dialog.open(true),
  busy(isBusy) {
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
  },
  edit: (draft) => composer.fill(draft),
  announce: (key) => say(byId("status"), key),
  /** Show a recording that has grown or is `finished`; one that was `chosen` opens the panel. */
  record(recording, finished, chosen = false) {
    if (chosen) showPanel(true);
    if (recording !== shown) panel.open((shown = recording), finished);
    else panel.update(finished);
  },
};

const chat = new Chat(page);
const composer = new Composer(
  (draft) => {
    if (!isReady || chat.isBusy) return;
    byId("banner").hidden = true;
    composer.fill();
    chat.send(draft);
  },
  (key, values) => showBanner(key, values),
);

function showBanner(key, values) {
  say(byId("banner"), key, values);
  byId("banner").hidden = false;
}

function showPanel(isOpen) {
  settings.set({ reading: isOpen });
  byId("reading").hidden = !isOpen;
  byId("reading-switch").ariaPressed = String(isOpen);
}

function switchLanguage(name) {
  setLanguage(name);
  panel.relabel();
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Wait until the model is loaded, then show its name. */
async function start() {
  while (!isReady) {
    try {
      const reason = await whyNotReady(settings.key);
      if (reason !== null) {
        showBanner("loading", { reason });
        await pause(POLL);
        continue;
      }
      const model = await getModel(settings.key);
      page.model = model.id;
      byId("model").textContent = model.id;
      document.title = model.id;
      if (model.max_model_len) say(byId("context"), "context", { tokens: model.max_model_len });
      byId("banner").hidden = true;
      isReady = true;
    } catch (error) {
      if (!error.key) throw error;
      showBanner(error.status === 401 ? "api_key_needed" : "waiting");
      if (error.status === 401) await dialog.open(true);
      await pause(POLL);
    }
  }
  byId("send").disabled = false;
}

byId("send").disabled = true;
byId("stop").addEventListener("click", () => chat.stop());
byId("new-chat").addEventListener("click", () => {
  chat.clear();
  composer.fill();
});
byId("open-settings").addEventListener("click", () => dialog.open());
byId("reading-switch").addEventListener("click", () => showPanel(byId("reading").hidden));
byId("reading-close").addEventListener("click", () => {
  showPanel(false);
  byId("reading-switch").focus();
});
byId("language").addEventListener("click", () => {
  const name = currentLanguage() === "en" ? "zh" : "en";
  settings.set({ language: name });
  switchLanguage(name);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && chat.isBusy && !document.querySelector("dialog[open]")) chat.stop();
});

switchLanguage(preferredLanguage(settings.values.language));
showPanel(settings.values.reading);
byId("draft").focus();
start();
