// The server renders and escapes what stands in <main>, and sends it anew whenever it is something else.
const live = document.getElementById("live");
const events = new EventSource("/events");
events.onmessage = (event) => {
  document.querySelector("main").innerHTML = event.data;
  live.textContent = "live";
  live.className = "chip good";
};
events.onerror = () => {
  live.textContent = "not live: the coordinator has stopped";
  live.className = "chip bad";
};
