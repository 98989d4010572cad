// The player: plays, scrubs by frames, says which frame is shown, lights the keyframe whose place it is.
// Listens on the document, as the page's parts come and go.
(() => {
  const stageOf = (node) => node.closest(".wj-stage");
  const videoOf = (stage) => stage.querySelector("video");
  const number = (stage, name) => Number(stage.dataset[name]);

  const show = (stage, frame) => {
    const paused = videoOf(stage).paused;
    const state = `${frame} ${paused}`;
    if (stage.dataset.shown === state) return; // most of the time: the page is drawn more often than the clip moves on
    stage.dataset.shown = state;
    const seek = stage.querySelector(".wj-seek");
    if (seek && Number(seek.value) !== frame) seek.value = frame;
    const told = stage.querySelector(".wj-frame");
    if (told) told.textContent = `${frame} / ${number(stage, "frames") - 1}`;
    for (const key of stage.querySelectorAll(".wj-key")) {
      key.classList.toggle("wj-on", Number(key.dataset.at) === frame);
    }
    const play = stage.querySelector(".wj-play");
    if (play) play.textContent = paused ? "▶" : "Ⅱ";
  };

  const goTo = (stage, frame) => {
    const last = number(stage, "frames") - 1;
    const wanted = Math.min(Math.max(frame, 0), last);
    const video = videoOf(stage);
    video.pause();
    video.currentTime = (wanted + 0.5) / number(stage, "fps");
    show(stage, wanted);
  };

  const now = (stage) => {
    const frame = Math.floor(videoOf(stage).currentTime * number(stage, "fps") + 0.001);
    return Math.min(Math.max(frame, 0), number(stage, "frames") - 1);
  };

  document.addEventListener("input", (event) => {
    if (event.target.matches(".wj-seek")) goTo(stageOf(event.target), Number(event.target.value));
  });

  document.addEventListener("click", (event) => {
    // On a phone the player may be elsewhere.
    if (event.target.closest("#make, #compare") && innerWidth < 700) {
      document.querySelector(".wj-stage").scrollIntoView({behavior: "smooth", block: "start"});
    }
    const key = event.target.closest(".wj-key");
    if (key && videoOf(stageOf(key))) goTo(stageOf(key), Number(key.dataset.at));
    const button = event.target.closest(".wj-scrub button");
    if (!button) return;
    const stage = stageOf(button);
    const video = videoOf(stage);
    if (button.matches(".wj-prev")) goTo(stage, now(stage) - 1);
    else if (button.matches(".wj-next")) goTo(stage, now(stage) + 1);
    else if (video.paused) video.play().catch(() => {});
    else video.pause();
  });

  // Keyframes of a few pixels keep them when they are enlarged.
  document.addEventListener("load", (event) => {
    const image = event.target;
    if (image.tagName === "IMG") image.classList.toggle("wj-tiny", image.naturalWidth > 0 && image.naturalWidth <= 128);
  }, true);

  const tick = () => {
    for (const stage of document.querySelectorAll(".wj-stage")) {
      if (videoOf(stage) && number(stage, "frames")) show(stage, now(stage));
    }
    requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
})();
