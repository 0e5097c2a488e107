// node docs/examples/forecast.mjs URL KEY < readings.json
// readings.json: {"units": "mg/dL", "readings": [{"at": "2026-01-05T08:00:00+01:00", "glucose": 112}, ...]}
// Research use. Dosing decisions should not be made based on this output.
const [url, key] = process.argv.slice(2);

let body = "";
for await (const piece of process.stdin) body += piece;

const answer = await fetch(`${url}/v1/forecast`, {
  method: "POST",
  headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
  body,
});
const told = await answer.json();

if (answer.status === 429) {
  console.log(`too many requests: wait ${answer.headers.get("retry-after")} s`);
} else if (!answer.ok) {
  // RFC 9457: `reason` is set when there is no forecast, as stale-data or sensor-flat.
  console.log(`no forecast: ${told.reason ?? told.title}. ${told.detail}`);
} else {
  for (const point of told.points.filter((p) => p.horizon_minutes % 30 === 0)) {
    const at = new Date(point.at).toISOString().slice(11, 16);
    console.log(`likely ${point.p10} to ${point.p90} ${told.units} at ${at} UTC, 8 in 10`);
  }
  console.log(told.use);
}
