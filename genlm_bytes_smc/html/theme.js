// The button changes between light and dark; until it is pressed, the system's choice holds.
{const button=document.getElementById('theme'),root=document.documentElement,
system=matchMedia('(prefers-color-scheme:dark)'),
dark=()=>root.dataset.theme?root.dataset.theme==='dark':system.matches,
say=()=>{button.textContent=dark()?'light colours':'dark colours';};
button.onclick=()=>{root.dataset.theme=dark()?'light':'dark';say();};
system.onchange=say;button.hidden=false;say();}
